"""Law 5: a constant group gives zero advantage, order inside a group is free, groups do not depend on processes."""

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.method.groups import EPS, group_advantage, group_deviation, group_scale, scale_field

NAN = math.nan
SCALES = ["group", "batch", "none"]

modest = settings(max_examples=50, deadline=None, derandomize=True, database=None)
scores_of_a_group = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=2, max_size=8)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 8, 13])
def test_constant_group_has_no_advantage(group_size, scale):
    """Law 5: every sample of a constant group gets exactly 0, also where the mean of equal values is not that value."""
    for value in (0.0, 1.0, 0.1, 0.3, 1 / 3, -0.7, 100.1, 1e-20, 1e20):
        scores = torch.full([2 * group_size], value)
        # The other group varies, so that the batch's deviation is not 0.
        scores[group_size:] += value * torch.arange(group_size)
        advantage = group_advantage(scores, group_size, scale)
        assert advantage[:group_size].tolist() == [0.0] * group_size


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "group", [[0.1] * 7 + [NAN], [NAN] + [0.3] * 12, [NAN, 0.7, NAN], [NAN, NAN]], ids=["last", "first", "one", "all"]
)
def test_constant_group_with_missing_scores(group, scale):
    """Law 5: missing scores do not make a constant group vary, and get 0 themselves."""
    assert group_advantage(torch.tensor(group), len(group), scale).tolist() == [0.0] * len(group)


def test_advantage_of_known_scores():
    """Law 5: minus the group's mean, over the group's, the batch's or no standard deviation (unbiased) plus eps."""
    scores = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 40.0])
    centered = torch.tensor([-2.0, -1.0, 3.0, -10.0, -10.0, 20.0])
    deviation = torch.tensor([7.0, 300.0]).sqrt().repeat_interleave(3)
    torch.testing.assert_close(group_advantage(scores, 3), centered / (deviation + EPS))
    torch.testing.assert_close(group_advantage(scores, 3, "group"), centered / (deviation + EPS))
    torch.testing.assert_close(group_advantage(scores, 3, "batch"), centered / (scores.std() + EPS))
    torch.testing.assert_close(group_advantage(scores, 3, "none"), centered)
    torch.testing.assert_close(group_advantage(scores[:3], 3), centered[:3] / (scores[:3].std() + EPS))


def test_eps_damps_a_nearly_constant_group():
    """Law 5: eps is added to the deviation, so differences below it give small advantages."""
    advantage = group_advantage(torch.tensor([-1.0, 1.0]), 2, eps=1.0)
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1))
    batch = group_advantage(torch.tensor([-1.0, 1.0]), 2, "batch", eps=1.0)
    torch.testing.assert_close(batch, advantage)


@pytest.mark.parametrize("scale", SCALES)
def test_missing_scores_are_left_out(scale):
    """Law 5: NaN scores get 0 and change nothing for the others."""
    full = group_advantage(torch.tensor([1.0, 2.0, 6.0, 4.0, 5.0, 9.0]), 3, scale)
    padded = group_advantage(torch.tensor([1.0, NAN, 2.0, 6.0, 4.0, 5.0, 9.0, NAN]), 4, scale)
    torch.testing.assert_close(padded[[0, 2, 3, 4, 5, 6]], full)
    assert padded[[1, 7]].tolist() == [0.0, 0.0]


@modest
@given(scores=scores_of_a_group, data=st.data(), scale=st.sampled_from(["group", "batch", "none"]))
def test_permuting_a_group_permutes_its_advantages(scores, data, scale):
    """Law 5: the result for a sample does not depend on its place in the group."""
    order = data.draw(st.permutations(range(len(scores))))
    values = torch.tensor(scores)
    permuted = group_advantage(values[list(order)], len(scores), scale)
    torch.testing.assert_close(permuted, group_advantage(values, len(scores), scale)[list(order)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalization", ["group", "sample"])
def test_permuting_a_group_permutes_its_field(normalization):
    """Law 5: what a sample's gradient is divided by does not depend on its place in the group."""
    generator = torch.Generator().manual_seed(1)
    field, magnitudes = torch.randn(8, 3, 2, generator=generator), torch.rand(8, generator=generator)
    order = torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])
    permuted = scale_field(field[order], magnitudes[order], 4, normalization)
    torch.testing.assert_close(permuted, scale_field(field, magnitudes, 4, normalization)[order])


@modest
@given(scores=scores_of_a_group, shift=st.integers(-50, 50), factor=st.integers(1, 20))
def test_advantages_ignore_units(scores, shift, factor):
    """Law 5: shifting or rescaling a reward does not change its group-normalized advantages, whose sum is 0."""
    values = torch.tensor(scores)
    advantage = group_advantage(values, len(scores), eps=1e-6)
    assert advantage.sum().item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(
        group_advantage(factor * values + shift, len(scores), eps=1e-6), advantage, rtol=1e-3, atol=1e-3
    )
    if values.std() > 0:
        assert advantage.std().item() == pytest.approx(1, abs=1e-3)


def test_one_process_equals_two():
    """Law 5: 8 samples in one process equal 4 + 4 in two, groups whole, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=generator)
    scores[2] = NAN
    magnitudes = torch.rand(8, generator=generator)
    field = torch.randn(8, 3, 2, generator=generator)
    for group_size in (1, 2, 4):
        for scale in ("group", "none"):
            halves = [group_advantage(half, group_size, scale) for half in scores.split(4)]
            assert torch.equal(torch.cat(halves), group_advantage(scores, group_size, scale))
        for normalization in ("group", "sample"):
            halves = [group_scale(half, group_size, normalization) for half in magnitudes.split(4)]
            assert torch.equal(torch.cat(halves), group_scale(magnitudes, group_size, normalization))
            halves = [
                scale_field(part, half, group_size, normalization)
                for part, half in zip(field.split(4), magnitudes.split(4), strict=True)
            ]
            assert torch.equal(torch.cat(halves), scale_field(field, magnitudes, group_size, normalization))


def test_the_batch_is_that_of_all_processes():
    """Law 5: a process that has half of the scores divides them by the deviation, or the mean, of all of them."""
    mine, theirs = torch.tensor([1.0, 2.0, 6.0, NAN]), torch.tensor([-8.0, 4.0, 16.0, 30.0])
    every = torch.cat([mine[:3], theirs])
    # What the other process adds: how many it has and their sum, then their squares about the mean of all.
    added = iter([torch.tensor([4.0, 42.0]), (theirs - every.mean()).square().sum()])
    advantage = group_advantage(mine, 4, "batch", total=lambda sums: sums + next(added))
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (every.std() + EPS)
    torch.testing.assert_close(advantage, torch.cat([expected, torch.zeros(1)]))
    divisor = group_scale(mine, 2, "batch", total=lambda sums: sums + torch.tensor([42.0, 4.0]))
    torch.testing.assert_close(divisor, torch.full([4], 51.0 / 7))


@pytest.mark.parametrize("shape", [(), (6, 1), (6, 4), (6, 3, 4, 4)], ids=str)
def test_fields_cannot_be_centered(shape):
    """Law 5: group_advantage rejects anything but `[N]`, so that a gradient field can never lose its drift."""
    with pytest.raises(ValueError, match="never be centered"):
        group_advantage(torch.zeros(shape), 2)


@pytest.mark.parametrize("group_size", [0, -2, 4, 5])
@pytest.mark.parametrize("statistic", [group_advantage, group_scale])
def test_groups_must_be_whole(statistic, group_size):
    """Law 5: samples that do not divide into groups are an error, not a smaller group."""
    with pytest.raises(ValueError, match="do not divide"):
        statistic(torch.zeros(6), group_size)


def test_half_precision_scores_are_computed_in_float32():
    """Law 5: advantages are float32 whatever precision the reward returned."""
    advantage = group_advantage(torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16), 3, eps=0.0)
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(7))


def test_deviation_of_samples_in_their_group():
    """A value's standard deviation (unbiased) in its group, averaged; what groups have between them is not in it."""
    samples = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(4))
    samples[3:] += 100
    values = samples.reshape(2, 3, 4).double().tolist()
    expected = fmean(stdev(sample[place] for sample in group) for group in values for place in range(4))
    assert group_deviation(samples, 3).item() == pytest.approx(expected, rel=1e-4)
