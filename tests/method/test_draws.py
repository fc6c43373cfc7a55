"""Noise levels and steps: uniform for each sample, and spread over groups and batch as their name says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.method.draws import draw_steps, draw_uniform
from rdm_sdk.method.noise import FlowSchedule, add_noise

CPU = torch.device("cpu")
SPREADS = ["stratified", "shared", "free"]

modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)
few, seeds = st.integers(1, 7), st.integers(0, 2**31)
by_spread = pytest.mark.parametrize("spread", SPREADS)


def spread_of(steps, num_steps):
    """Return by how much the most frequent step comes more often than the least frequent one."""
    counts = torch.bincount(steps, minlength=num_steps)
    assert len(counts) == num_steps
    return int(counts.max() - counts.min())


def draw_sigma(spread, num_groups, group_size, low, high):
    """Return a flow's noise levels, spread as a run spreads them."""
    uniform = draw_uniform(spread, num_groups, group_size, CPU)
    return FlowSchedule().levels(uniform, torch.full_like(uniform, low), torch.full_like(uniform, high))


@by_spread
def test_each_sample_is_uniform(spread):
    """Every sample's level is uniform over the range, wherever it stands in the group and in the batch."""
    torch.manual_seed(0)
    draws = torch.stack([draw_sigma(spread, 3, 4, 0.2, 0.8) for _ in range(4000)])
    assert draws.shape == (4000, 12)
    expected = 0.2 + 0.6 * (torch.arange(4000) + 0.5) / 4000
    # The Kolmogorov-Smirnov distance of 4000 draws stays below 0.031 with probability 0.999, for each of 12 samples.
    assert (draws.sort(0).values - expected[:, None]).abs().max() < 0.6 * 0.035


@modest
@given(num_groups=few, group_size=few, seed=seeds)
def test_stratified_draws_are_a_latin_square(num_groups, group_size, seed):
    """One sample of each group in each of `group_size` equal intervals, one of the batch in each of N."""
    torch.manual_seed(seed)
    num = num_groups * group_size
    draws = draw_uniform("stratified", num_groups, group_size, CPU).double()
    in_group = (draws * group_size).floor().reshape(num_groups, group_size)
    assert in_group.sort(1).values.tolist() == [list(range(group_size))] * num_groups
    assert (draws * num).floor().sort().values.tolist() == list(range(num))


@modest
@given(num_groups=few, group_size=few, seed=seeds)
def test_shared_draws_are_one_level_per_group(num_groups, group_size, seed):
    """All samples of a group share its level; the groups have one level in each of `num_groups` intervals."""
    torch.manual_seed(seed)
    levels = draw_uniform("shared", num_groups, group_size, CPU).double().reshape(num_groups, group_size)
    assert (levels == levels[:, :1]).all()
    assert (levels[:, 0] * num_groups).floor().sort().values.tolist() == list(range(num_groups))


def test_free_draws_are_independent():
    """A sample's level says nothing about the next one's; stratified neighbors avoid each other."""
    torch.manual_seed(1)
    correlations = {}
    for spread in ("stratified", "free"):
        draws = torch.stack([draw_uniform(spread, 2, 2, CPU) for _ in range(4000)])
        correlations[spread] = torch.corrcoef(draws.T)
    assert (correlations["free"] - torch.eye(4)).abs().max() < 0.06
    # Two in a group are in different halves: covariance -1/16 of a variance of 1/12.
    assert correlations["stratified"][0, 1].item() == pytest.approx(-0.75, abs=0.05)
    # Across groups, two samples meet in the same half as often as not, but then in different quarters.
    assert correlations["stratified"][0, 2].item() == pytest.approx(-0.09, abs=0.06)


@by_spread
def test_levels_stay_in_their_range(spread):
    """The range is [low, high), also for a single sample, and is covered from end to end."""
    torch.manual_seed(2)
    draws = torch.cat([draw_sigma(spread, 1, 1, 0.02, 0.98) for _ in range(500)])
    assert 0.02 <= draws.min() < 0.05
    assert 0.95 < draws.max() < 0.98


@by_spread
def test_each_sample_trains_every_step_equally_often(spread):
    """Every sample's step is uniform over the grid, wherever it stands."""
    torch.manual_seed(3)
    draws = torch.stack([draw_steps(spread, 3, 2, 4, CPU) for _ in range(2000)])
    assert draws.shape == (2000, 6)
    assert draws.dtype == torch.int64
    shares = torch.stack([(draws == k).float().mean(0) for k in range(4)])
    torch.testing.assert_close(shares, torch.full((4, 6), 0.25), rtol=0, atol=0.05)


@modest
@given(num_groups=few, group_size=few, num_steps=st.integers(1, 5), seed=seeds)
def test_stratified_steps_are_even_in_every_group(num_groups, group_size, num_steps, seed):
    """Inside a group no step comes more than once more often than another."""
    torch.manual_seed(seed)
    for own in draw_steps("stratified", num_groups, group_size, num_steps, CPU).split(group_size):
        assert spread_of(own, num_steps) <= 1


@modest
@given(num_groups=few, group_size=few, num_steps=st.integers(1, 5), seed=seeds)
def test_steps_are_even_over_the_batch(num_groups, group_size, num_steps, seed):
    """Stratified steps are even over the samples, shared ones over the groups."""
    torch.manual_seed(seed)
    shared = draw_steps("shared", num_groups, group_size, num_steps, CPU).reshape(num_groups, group_size)
    assert (shared == shared[:, :1]).all()
    assert spread_of(shared[:, 0], num_steps) <= 1
    assert spread_of(draw_steps("stratified", num_groups, group_size, num_steps, CPU), num_steps) <= 1


def test_free_steps_are_independent():
    """Each sample draws its step on its own: two samples agree as often as chance says."""
    torch.manual_seed(4)
    draws = torch.stack([draw_steps("free", 2, 2, 4, CPU) for _ in range(2000)])
    for other in (1, 2, 3):
        assert (draws[:, 0] == draws[:, other]).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_samples_are_not_tied_to_their_neighbors():
    """Which sample of a group takes which step is drawn: a sample's step tells nothing of the order of the others."""
    torch.manual_seed(6)
    draws = torch.stack([draw_steps("stratified", 1, 4, 4, CPU) for _ in range(400)])
    gaps = torch.bincount((draws[:, 1] - draws[:, 0]) % 4, minlength=4)
    assert gaps[0] == 0
    assert gaps[1:].min() > 80


@pytest.mark.parametrize("spread", ["stratified", "shared"])
def test_groups_are_not_tied_to_their_neighbors(spread):
    """Which group takes which of the shared-out steps is drawn too: no group always follows the one before it."""
    torch.manual_seed(5)
    draws = torch.stack([draw_steps(spread, 4, 1, 4, CPU) for _ in range(400)])
    gaps = torch.bincount((draws[:, 1] - draws[:, 0]) % 4, minlength=4)
    assert gaps[0] == 0
    assert gaps[1:].min() > 80


def test_a_level_for_each_sample_is_required():
    """A noise level that would broadcast by accident is an error."""
    x_0 = torch.zeros(3, 2)
    for sigma in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((3, 1), 0.5)):
        with pytest.raises(ValueError, match="one value per sample"):
            add_noise(FlowSchedule(), x_0, x_0, sigma)
