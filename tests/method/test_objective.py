"""From reward outputs to the student's loss: units, sums, and the policy loss against independent computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk.method.groups import constant_groups, group_advantage
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.method.objective import aggregate, combine, normalize, policy_loss, policy_pull
from rdm_sdk.method.sampling import FewStepPolicy, replay_log_ratio, rollout
from rdm_sdk.method.transitions import log_density
from rdm_sdk.types import RewardOutput, Rollout, select_steps

G = 4
GRID = (1.0, 0.75, 0.5, 0.25)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return fixed normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def advantage_by_hand(values: list[float]) -> list[float]:
    """Return (r - mean) / std of one group, written without the package."""
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return [(v - mean) / std for v in values]


# ---- Normalization ----------------------------------------------------------------------------------------------


def test_a_field_is_divided_by_its_own_groups_magnitude() -> None:
    """With magnitudes: by them; without: by mean |g|; over the group or the sample."""
    field, magnitude, none = drawn(8, 2, 3), drawn(8, seed=1).abs() + 0.1, torch.zeros(8)
    outputs = {"dm": RewardOutput(none, field, magnitude), "own": RewardOutput(none, field)}
    size = field.abs().mean((1, 2))
    for how in ("group", "sample"):
        fields = normalize(outputs, G, how)
        for name, values in (("dm", magnitude), ("own", size)):
            used = "group" if how == "sample" and name == "own" else how
            divisor = {
                "group": values.reshape(2, G).mean(1).repeat_interleave(G),
                "sample": values,
            }[used]
            torch.testing.assert_close(fields[name], field / divisor[:, None, None])
    assert normalize({"scores alone": RewardOutput(none)}, G, "group") == {}


def test_sample_means_group_where_there_are_no_magnitudes() -> None:
    """A sample's own |gradient| is no statistic: it would make a satisfied reward's last words as loud as any."""
    field = torch.ones(8, 3)
    field[0] *= 1e-6
    outputs = {"own": RewardOutput(torch.zeros(8), field)}
    sample, group = (normalize(outputs, G, how)["own"] for how in ("sample", "group"))
    assert torch.equal(sample, group)
    assert sample[0].abs().max() < 1e-5 < sample[1].abs().min()


@pytest.mark.parametrize("how", ["group", "sample"])
def test_a_sample_without_a_score_is_in_no_statistic(how: str) -> None:
    """NaN scores: what the sample says does not change the others' units."""
    field, magnitude = drawn(8, 3), drawn(8, seed=1).abs() + 0.1
    missing = torch.tensor([0.0, torch.nan, 0, 0, 0, 0, 0, 0])
    loud, louder = field.clone(), magnitude.clone()
    loud[1], louder[1] = 1e6, 1e6
    for values, sizes in ((field, loud), (None, None)):
        quiet = RewardOutput(missing, field, magnitude if values is not None else None)
        noisy = RewardOutput(missing, loud, louder if sizes is not None else None)
        one, other = (normalize({"r": o}, G, how)["r"] for o in (quiet, noisy))
        keep = [0, 2, 3, 4, 5, 6, 7]
        torch.testing.assert_close(one[keep], other[keep])


# ---- Sums -------------------------------------------------------------------------------------------------------


A, B = [1.0, 2.0, 3.0, 10.0], [0.0, 5.0, -5.0, 1.0]


def summed(
    scores: dict[str, list[float]], weights: dict[str, float], scale: Any = "group", how: Any = "normalize_then_sum"
) -> Tensor:
    """Return the advantages of one group's scores."""
    found = aggregate({name: torch.tensor(values) for name, values in scores.items()}, weights, G, scale, how)
    assert found is not None
    return found


def test_normalize_then_sum() -> None:
    """Normalize each, weight, sum, re-normalize: units do not matter, weights do."""
    got = summed({"a": [v * 1000 for v in A], "b": B}, {"a": 0.5, "b": -0.25})
    mixed = [0.5 * x - 0.25 * y for x, y in zip(advantage_by_hand(A), advantage_by_hand(B), strict=True)]
    expected = torch.tensor([0.75 * v for v in advantage_by_hand(mixed)])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_sum_then_normalize() -> None:
    """Weighted sum first, then one normalization: the reward with the larger spread rules."""
    weights = {"a": 0.5, "b": -0.25}
    got = summed({"a": A, "b": B}, weights, how="sum_then_normalize")
    expected = [0.75 * v for v in advantage_by_hand([0.5 * x - 0.25 * y for x, y in zip(A, B, strict=True)])]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    ruled = summed({"a": [1e4 * v for v in A], "b": B}, weights, how="sum_then_normalize")
    torch.testing.assert_close(ruled, 0.75 * torch.tensor(advantage_by_hand(A)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("weight", [0.3, -2.0])
def test_a_single_reward_keeps_its_weight(aggregation: Any, scale: Any, weight: float) -> None:
    """Normalization does not change what one reward alone weighs: weight times its advantage."""
    scores = {"a": drawn(8)}
    got = aggregate(scores, {"a": weight}, G, scale, aggregation)
    alone = aggregate(scores, {"a": 1.0}, G, scale, aggregation)
    assert alone is not None
    torch.testing.assert_close(got, weight * alone, rtol=1e-4, atol=1e-5)
    if aggregation == "sum_then_normalize":
        torch.testing.assert_close(alone, group_advantage(scores["a"], G, scale))


@pytest.mark.parametrize("how", ["normalize_then_sum", "sum_then_normalize"])
def test_the_batch_is_that_of_all_processes(how: Any) -> None:
    """A deviation of the batch is that of every process's scores, or sums of advantages, whichever is divided."""
    mine, theirs = torch.tensor(A), torch.tensor([7.0, 7.5, 9.0, 30.0])
    rows = (A, theirs.tolist())
    first, other = map(torch.tensor, map(advantage_by_hand, rows) if how == "normalize_then_sum" else rows)
    every = torch.cat([first, other])
    # What the other process adds: how many it has and their sum, then their squares about the mean of all.
    added = iter([torch.tensor([4.0, other.sum()]), (other - every.mean()).square().sum()])
    got = aggregate({"a": mine}, {"a": 0.5}, G, "batch", how, lambda sums: sums + next(added))
    torch.testing.assert_close(got, 0.5 * (first - first.mean()) / every.std(), rtol=1e-3, atol=1e-5)


def test_a_single_reward_keeps_its_weight_beside_missing_scores() -> None:
    """Also where some samples have no score: the advantages of the others are not scaled up."""
    scores = {"a": [1.0, 3.0, torch.nan, torch.nan]}
    for how in ("normalize_then_sum", "sum_then_normalize"):
        alone = summed(scores, {"a": 1.0}, how=how)
        torch.testing.assert_close(alone, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0, 0.0]), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(summed(scores, {"a": 0.5}, how=how), 0.5 * alone, rtol=1e-4, atol=1e-5)


def test_without_scaling_sums_are_plain() -> None:
    """scale_rewards="none": centered scores, weighted and added."""
    scores = {"a": [1.0, 2.0, 3.0, 6.0], "b": [4.0, 0.0, 0.0, 0.0]}
    got = summed(scores, {"a": 2.0, "b": 1.0}, "none", "sum_then_normalize")
    torch.testing.assert_close(got, torch.tensor([-4.0 + 3, -2.0 - 1, 0.0 - 1, 6.0 - 1]))


def test_rewards_that_contradict_each_other() -> None:
    """Exact opposites cancel to zero, not to noise; a slight difference is brought back to full size."""
    up = [0.0, 1.0, 2.0, 3.0]
    for how in ("normalize_then_sum", "sum_then_normalize"):
        opposites = summed({"a": up, "b": up[::-1]}, {"a": 1.0, "b": 1.0}, how=how)
        assert torch.equal(opposites.abs(), torch.zeros(4))
        got = summed({"a": up, "b": [3.0, 2.0, 1.0, 0.2]}, {"a": 1.0, "b": 1.0}, how=how)
        assert got.std().item() == pytest.approx(2.0, rel=1e-2)  # the weights' sum, but for eps


def test_missing_scores_count_for_nobody() -> None:
    """A sample without one reward's score goes by the other's; without any, it has advantage 0."""
    scores = {"a": [torch.nan, 1.0, 2.0, 3.0], "b": [torch.nan, torch.nan, 0.0, 1.0]}
    for how in ("normalize_then_sum", "sum_then_normalize"):
        alone = summed({"a": scores["a"]}, {"a": 1.0}, how=how)
        torch.testing.assert_close(alone, torch.tensor([0.0, -1.0, 0.0, 1.0]), atol=1e-3, rtol=0)
        total = summed(scores, {"a": 1.0, "b": 1.0}, how=how)
        assert total.isfinite().all()
        assert total[0] == 0
        assert total[1] < total[2] < total[3]


def test_no_weight_no_advantage() -> None:
    """Where nothing counts there is no signal, and a reward without weight leaves no trace, NaN and all."""
    scores = {"a": torch.tensor(A), "b": torch.full((4,), torch.nan)}
    assert aggregate(scores, {"a": 0.0, "b": 0.0}, G, "group", "sum_then_normalize") is None
    assert aggregate({}, {}, G, "group", "sum_then_normalize") is None
    for how in ("normalize_then_sum", "sum_then_normalize"):
        assert torch.equal(
            aggregate(scores, {"a": 0.5, "b": 0.0}, G, "group", how),
            aggregate({"a": scores["a"]}, {"a": 0.5}, G, "group", how),
        )


def test_fields_add_up_by_their_weights() -> None:
    """g = sum_k lambda_k g_k; a weight of 0 leaves a reward out, NaN and all; a weight of 1 changes no bit."""
    one, two = drawn(4, 3), drawn(4, 3, seed=1)
    torch.testing.assert_close(combine({"a": one, "b": two}, {"a": 1.0, "b": -0.5}), one - 0.5 * two)
    torch.testing.assert_close(combine({"a": one, "b": two}, {"a": 0.3, "b": 4.0}), 0.3 * one + 4 * two)
    broken = torch.full((4, 3), torch.nan)
    assert torch.equal(combine({"a": one, "b": broken}, {"a": 1.0, "b": 0.0}), one)
    assert combine({"a": one}, {"a": 0.0}) is None


def test_constant_groups() -> None:
    """Constant groups and groups without a score teach nothing."""
    values = torch.tensor([1.0, 1.0, 1.0, torch.nan] + [torch.nan] * 4 + [1.0, 2.0, torch.nan, torch.nan] + [0.0] * 4)
    assert constant_groups(values, 4).tolist() == [True, True, False, True]


# ---- The policy route -------------------------------------------------------------------------------------------


def few_steps(kind: str = "renoise", eta: float = 1.0) -> tuple[FewStepPolicy, Rollout, Tensor]:
    """Return a policy, a rollout of eight samples under a made-up student, and steps that have a density."""
    policy = FewStepPolicy(FlowSchedule(), GRID, kind, eta)
    torch.manual_seed(5)

    def student_of(rows: Tensor):
        return lambda x_t, sigma: torch.tanh(x_t) * (1 - 0.3 * sigma[:, None, None])

    done = rollout(student_of, torch.randn(8, 2, 3), torch.full((8,), 4), policy)
    return policy, done, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.mark.parametrize("kind", ["renoise", "cps", "sde"])
def test_both_reductions_have_the_gradient_of_the_averaged_log_probability(kind: str) -> None:
    """At ratio 1 the loss's gradient is -w A d(mean log pi)/d x_0 / N, summed densities or averaged ones."""
    policy, done, steps = few_steps(kind, 0.7)
    advantage, weights = drawn(8, seed=2), drawn(8, seed=3).abs()
    rows = torch.arange(8)

    def gradient(loss_of) -> Tensor:
        x_0 = select_steps(done.x_0, steps).clone().requires_grad_()
        (got,) = torch.autograd.grad(loss_of(x_0), x_0)
        return got

    def own(reduction: str, dimensions: int):
        def loss(x_0: Tensor) -> Tensor:
            log_ratios = replay_log_ratio(done, x_0, rows, steps, policy, reduction)
            assert torch.equal(log_ratios, torch.zeros(8))
            policy_part = policy_loss(log_ratios, advantage, weights, 0.2, dimensions, 8)
            assert policy_part.clipped == 0
            return policy_part.loss

        return loss

    def plain(x_0: Tensor) -> Tensor:
        transition = policy.transition(select_steps(done.states, steps), x_0, steps)
        after = select_steps(done.states, steps + 1)
        return -(weights * advantage * log_density(transition, after).flatten(1).mean(1)).sum() / 8

    expected = gradient(plain)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(own("sum", 6)), expected)
    torch.testing.assert_close(gradient(own("mean", 1)), expected)


def test_the_policy_loss_counts_all_samples() -> None:
    """Samples at the last step have no ratio, yet count in the mean; ratios outside the range are clipped."""
    log_ratios = torch.tensor([0.0, 0.5, -0.5]).requires_grad_()
    got = policy_loss(log_ratios, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 1.0]), 0.2, 10, 4)
    by_hand = -(1.0 + 2.0 * 1.2 - 0.8) / (4 * 10)
    assert got.loss.item() == pytest.approx(by_hand)
    assert got.clipped.item() == pytest.approx(2 / 3)
    (slope,) = torch.autograd.grad(got.loss, log_ratios)
    assert slope.tolist() == pytest.approx([-1 / 40, 0.0, 0.0])


def test_policy_pull_is_the_size_of_the_policy_gradient() -> None:
    """For re-noising d log pi / d x_0 = alpha eps / sigma, so the pull is the mean |A alpha eps / sigma|."""
    policy, done, steps = few_steps()
    advantage = drawn(8, seed=2)
    x_0 = select_steps(done.x_0, steps).clone().requires_grad_()
    log_ratios = replay_log_ratio(done, x_0, torch.arange(8), steps, policy, "sum")
    got = policy_pull(log_ratios, x_0, {"a": advantage, "twice": 2 * advantage})
    sigma = torch.tensor([*GRID, 0.0])[steps + 1][:, None, None]
    eps = (select_steps(done.states, steps + 1) - (1 - sigma) * x_0.detach()) / sigma
    expected = (advantage[:, None, None] * (1 - sigma) * eps / sigma).abs().mean().item()
    assert got == pytest.approx({"a": expected, "twice": 2 * expected}, rel=1e-4)
    log_ratios.sum().backward()  # the graph is still there for the loss
    assert x_0.grad is not None


def test_no_transition_no_pull() -> None:
    """Where all samples are at the last step, nothing pulls."""
    assert policy_pull(torch.zeros(0), torch.zeros(0, 2), {"a": torch.zeros(0)}) == {"a": 0.0}
