"""Law 4: the ratio is 1 before the first update; re-weighted old samples are samples of the new policy."""

import math

import pytest
import torch

from rdm_sdk.method.importance import clip_fraction, effective_share, log_ratio, truncated_weights, weight_sums
from rdm_sdk.method.losses import clipped_surrogate
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule, per_sample
from rdm_sdk.method.transitions import TRANSITIONS, Transition, log_density, renoising_transition, step

NUM_SAMPLES = 100_000
FLOW, VP = FlowSchedule(), VariancePreservingSchedule()
RANDOM = {
    "renoise": (FLOW, "renoise"),
    "cps": (FLOW, "cps"),
    "sde": (FLOW, "sde"),
    "renoise-vp": (VP, "renoise"),
    "cps-vp": (VP, "cps"),
}
by_rule = pytest.mark.parametrize(("schedule", "kind"), RANDOM.values(), ids=RANDOM.keys())
by_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


def shifted_policies(dimensions, delta, std):
    """Return old samples, the old and the new policy and their means, `delta` stds apart in every dimension."""
    generator = torch.Generator().manual_seed(0)
    old_mean = torch.linspace(-1, 1, dimensions)
    new_mean = old_mean + delta * std
    stds = torch.full([NUM_SAMPLES], std)
    old = Transition(old_mean.expand(NUM_SAMPLES, dimensions), stds)
    new = Transition(new_mean.expand(NUM_SAMPLES, dimensions), stds)
    samples = step(old, torch.randn(NUM_SAMPLES, dimensions, generator=generator))
    return samples, old, new, old_mean, new_mean


def log_probability(transition, x_next, reduction="sum"):
    """Return the log-density of states, `[N]`: the joint one, or that over the number of dimensions."""
    flat = log_density(transition, x_next).flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)


@by_reduction
@by_rule
def test_ratio_is_one_before_the_first_update(schedule, kind, reduction):
    """Law 4: replaying a rollout through the unchanged student gives log-ratios of exactly 0, with a live gradient."""
    generator = torch.Generator().manual_seed(0)
    sigma, sigma_next = torch.linspace(0.5, 1, 8), torch.linspace(0.2, 0.8, 8)
    states, eps = (torch.randn(8, 64, generator=generator) for _ in range(2))
    weight = (torch.randn(64, 64, generator=generator) / 8).requires_grad_()

    def policy():
        return TRANSITIONS[kind](schedule, states, (states @ weight).tanh(), sigma, sigma_next, 0.7)

    with torch.no_grad():
        old = policy()
        x_next = step(old, eps)
    new = policy()
    logs = log_ratio(new, old, x_next, reduction)
    assert torch.equal(logs, torch.zeros(8))
    assert torch.equal(logs.exp(), torch.ones(8))
    assert torch.equal(truncated_weights(logs, 2.0), torch.ones(8))
    assert clip_fraction(logs.exp(), 1e-6) == 0

    # At ratio 1 the gradient is that of the log-density: the on-policy policy gradient.
    advantage = torch.linspace(-1, 1, 8)
    (ours,) = torch.autograd.grad(clipped_surrogate(logs.exp(), advantage, 0.1).sum(), weight, retain_graph=True)
    loss = (-advantage * log_probability(new, x_next, reduction)).sum()
    (policy_gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(ours, policy_gradient)
    assert ours.abs().max() > 0


@by_rule
def test_log_ratio_is_the_difference_of_normal_densities(schedule, kind):
    """Law 4: "sum" is the joint log-ratio by torch's Normal in float64; "mean" is that over the dimension."""
    generator = torch.Generator().manual_seed(1)
    x_t, x_0, moved, x_next = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(4))
    sigma, sigma_next = torch.linspace(0.5, 1, 5), torch.linspace(0.2, 0.8, 5)
    old, new = (TRANSITIONS[kind](schedule, x_t, p, sigma, sigma_next, 0.7) for p in (x_0, x_0 + 0.3 * moved))
    logs = []
    for own in (new, old):
        normal = torch.distributions.Normal(own.mean.double(), own.std.double()[:, None, None, None])
        logs.append(normal.log_prob(x_next.double()).sum((1, 2, 3)))
    expected = (logs[0] - logs[1]).float()
    assert expected.abs().min() > 0.05
    torch.testing.assert_close(log_ratio(new, old, x_next), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(log_ratio(new, old, x_next, "sum"), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(log_ratio(new, old, x_next, "mean"), expected / 48, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_ratio(old, new, x_next), -log_ratio(new, old, x_next))


def test_log_ratio_keeps_its_precision_at_high_dimension():
    """Law 4: a small shift in 65,536 dimensions, whose log-densities of about -6e4 hold no more than two decimals."""
    generator = torch.Generator().manual_seed(2)
    dimensions, std = 65_536, torch.full([16], 0.75)
    mean, eps, direction = (torch.randn(16, dimensions, generator=generator) for _ in range(3))
    old, new = Transition(mean, std), Transition(mean + 3e-4 * direction, std)
    x_next = step(old, eps)
    exact = torch.stack(
        [
            torch.distributions.Normal(own.mean.double(), 0.75, validate_args=False).log_prob(x_next.double()).sum(1)
            for own in (new, old)
        ]
    )
    exact = (exact[0] - exact[1]).float()
    assert exact.std() > 0.05
    error = (log_ratio(new, old, x_next) - exact).abs().max()
    assert error < 3e-4
    # The premise: differences of summed densities are off by many times that.
    assert (log_probability(new, x_next) - log_probability(old, x_next) - exact).abs().max() > 10 * error


def test_old_transition_is_detached():
    """Law 4: no gradient reaches the policy that made the rollout, not even through its deviation."""
    new_mean, old_mean = (torch.full((3, 2), value, requires_grad=True) for value in (0.3, 0.1))
    new_std, old_std = (torch.full((3,), value, requires_grad=True) for value in (0.5, 0.6))
    logs = log_ratio(Transition(new_mean, new_std), Transition(old_mean, old_std), torch.zeros(3, 2))
    leaves = [new_mean, new_std, old_mean, old_std]
    through_new, through_std, *through_old = torch.autograd.grad(logs.sum(), leaves, allow_unused=True)
    torch.testing.assert_close(through_new, torch.full((3, 2), -0.3 / 0.25))
    torch.testing.assert_close(through_std, torch.full((3,), 2 * (0.09 / 0.125 - 1 / 0.5)))
    assert through_old == [None, None]


def test_reweighted_samples_recover_the_shifted_mean():
    """Law 4: E_old[ratio] = 1 and E_old[ratio x] is the new mean, far from the old one."""
    samples, old, new, old_mean, new_mean = shifted_policies(dimensions=4, delta=0.3, std=0.5)
    ratio = log_ratio(new, old, samples).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close((ratio[:, None] * samples).mean(0), new_mean, rtol=0, atol=0.02)
    assert (new_mean - old_mean).min() > 0.1
    # The averaged form is no importance weight: it recovers next to nothing of the shift.
    averaged = log_ratio(new, old, samples, "mean").exp()
    assert ((averaged[:, None] * samples).mean(0) / averaged.mean() - old_mean).max() < 0.5 * (
        new_mean - old_mean
    ).min()


@by_rule
def test_reweighted_transitions_recover_the_new_mean(schedule, kind):
    """Law 4 for every rule: old next states, re-weighted, have the mean of the student's new transition."""
    generator = torch.Generator().manual_seed(3)
    x_t, x_0 = (torch.randn(1, 2, generator=generator).expand(NUM_SAMPLES, 2) for _ in range(2))
    sigma, sigma_next = torch.full([NUM_SAMPLES], 0.8), torch.full([NUM_SAMPLES], 0.5)
    old, new = (TRANSITIONS[kind](schedule, x_t, p, sigma, sigma_next, 0.8) for p in (x_0, x_0 + 0.4))
    x_next = step(old, torch.randn(NUM_SAMPLES, 2, generator=generator))
    ratio = log_ratio(new, old, x_next).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=0.015)
    torch.testing.assert_close((ratio[:, None] * x_next).mean(0), new.mean[0], rtol=0, atol=0.02)
    assert (new.mean[0] - old.mean[0]).abs().min() > 0.05


@pytest.mark.parametrize(("dimensions", "delta"), [(1, 0.5), (4, 0.3), (16, 0.1), (16, 0.2)])
def test_effective_sample_size_of_a_shift(dimensions, delta):
    """Law 4: the effective sample size falls like exp(-D delta^2)."""
    samples, old, new, *_ = shifted_policies(dimensions, delta, std=0.7)
    share = effective_share(weight_sums(log_ratio(new, old, samples).exp()))
    assert share.item() == pytest.approx(math.exp(-dimensions * delta**2), rel=0.03)


@pytest.mark.parametrize(
    ("weights", "effective"),
    [
        *((torch.full([12], weight), 12) for weight in (1.0, 0.37, 1e-30)),
        (torch.tensor([1e6, 1.0, 1.0]), 1),
        (torch.tensor([2.0, 2.0, 0.0, 0.0]), 2),
        (torch.tensor([1.0, 3.0]), 1.6),
        (torch.zeros(3), 0),
    ],
    ids=str,
)
def test_effective_sample_size_of_known_weights(weights, effective):
    """Law 4: equal weights count fully at any scale, one dominant weight counts once, zero weights do not count."""
    share = effective_share(weight_sums(weights))
    assert share.item() * len(weights) == pytest.approx(effective, abs=1e-5)
    parts = sum(weight_sums(part) for part in weights.split(1))  # as if of several processes
    assert effective_share(parts).item() == pytest.approx(share.item())


def test_truncated_weights_are_capped_ratios():
    """Law 4: a weight is the ratio up to the cap, whatever the float range, and carries no gradient."""
    logs = torch.tensor([-200.0, -1.0, 0.0, 0.5, 3.0, 200.0], requires_grad=True)
    weights = truncated_weights(logs, 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.0, math.exp(-1), 1.0, math.exp(0.5), 2.0, 2.0]))
    assert weights[2] == 1
    assert not weights.requires_grad


def test_truncation_trades_bias_for_variance():
    """Law 4: capped weights vary less than the ratios, and their mean falls below 1 by no more than the capped tail."""
    samples, old, new, *_ = shifted_policies(dimensions=16, delta=0.3, std=0.5)
    ratio = log_ratio(new, old, samples)
    weights = truncated_weights(ratio, 2.0)
    tail = (ratio.exp() - 2).clamp_min(0).mean()
    assert weights.var() < 0.25 * ratio.exp().var()
    assert (1 - weights.mean()).item() == pytest.approx(tail.item(), abs=0.03)
    assert tail > 0.1


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=lambda s: type(s).__name__)
def test_log_probability_is_the_normal_density(schedule):
    """Law 4: "sum" is the joint log-density of N(alpha x_0, sigma^2 I); "mean" is that over the dimension."""
    generator = torch.Generator().manual_seed(1)
    x_t, x_0, x_next = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    sigma = torch.linspace(0.1, 0.9, 5)
    transition = renoising_transition(schedule, x_t, x_0, torch.ones(5), sigma)
    s = per_sample(sigma, x_0)
    alpha = 1 - s if isinstance(schedule, FlowSchedule) else (1 - s**2) ** 0.5
    expected = torch.distributions.Normal(alpha * x_0, s).log_prob(x_next).sum((1, 2, 3))
    torch.testing.assert_close(log_probability(transition, x_next), expected)
    torch.testing.assert_close(log_probability(transition, x_next, "sum"), expected)
    torch.testing.assert_close(log_probability(transition, x_next, "mean"), expected / 48)


def test_densities_are_float32_for_half_precision_states():
    """Law 4: states in half precision still get a float32 density and ratio, else every ratio is rounding noise."""
    mean, moved, x_next = (torch.full((2, 512), value, dtype=torch.bfloat16) for value in (0.1, 0.11, 0.3))
    old, new = (Transition(m, torch.full([2], 0.5, dtype=torch.bfloat16)) for m in (mean, moved))
    density, logs = log_probability(old, x_next), log_ratio(new, old, x_next)
    expected = torch.distributions.Normal(mean.float(), 0.5).log_prob(x_next.float()).sum(1)
    assert density.dtype == logs.dtype == torch.float32
    torch.testing.assert_close(density, expected)
    torch.testing.assert_close(
        logs,
        torch.distributions.Normal(moved.float(), 0.5).log_prob(x_next.float()).sum(1) - expected,
        rtol=1e-3,
        atol=1e-3,
    )


def test_clip_fraction_counts_both_sides():
    """Law 4: clip_fraction is the share of ratios outside [1 - epsilon, 1 + epsilon]."""
    ratio = torch.tensor([0.5, 0.95, 1.0, 1.05, 1.5], requires_grad=True)
    assert clip_fraction(ratio, 0.1).item() == pytest.approx(0.4)
    assert clip_fraction(ratio, 0.01).item() == pytest.approx(0.8)
    assert clip_fraction(ratio, 1.0).item() == 0
    assert not clip_fraction(ratio, 0.1).requires_grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.5, 2.0, -2.4, 0.0),
        (1.5, -2.0, 3.0, 2.0),
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipped_surrogate_is_pessimistic(ratio, advantage, loss, gradient):
    """Law 4: beyond the range a step that helps gets no more gradient, and one that hurts keeps all of it."""
    r = torch.tensor([ratio], requires_grad=True)
    ours = clipped_surrogate(r, torch.tensor([advantage]), 0.2)
    assert ours.shape == (1,)
    assert ours.item() == pytest.approx(loss)
    assert torch.autograd.grad(ours.sum(), r)[0].item() == pytest.approx(gradient)
