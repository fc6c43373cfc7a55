"""Law 4: the ratio is 1 before the first update; re-weighted old samples are samples of the new policy."""

import math

import pytest
import torch

from rdm_sdk.core.importance import clip_fraction, effective_sample_size, importance_ratio
from rdm_sdk.core.losses import clipped_surrogate
from rdm_sdk.core.noise import FlowSchedule, VariancePreservingSchedule, per_sample
from rdm_sdk.core.transitions import Transition, log_probability, renoising_transition, step

NUM_SAMPLES = 100_000


def shifted_policies(dimensions, delta, std):
    """Return old samples, both log-densities and the two means; the mean moves by `delta` stds in every dimension."""
    generator = torch.Generator().manual_seed(0)
    old_mean = torch.linspace(-1, 1, dimensions)
    new_mean = old_mean + delta * std
    stds = torch.full([NUM_SAMPLES], std)
    old = Transition(old_mean.expand(NUM_SAMPLES, dimensions), stds)
    new = Transition(new_mean.expand(NUM_SAMPLES, dimensions), stds)
    samples = step(old, torch.randn(NUM_SAMPLES, dimensions, generator=generator))
    return samples, log_probability(old, samples), log_probability(new, samples), old_mean, new_mean


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ratio_is_one_before_the_first_update(reduction):
    """Law 4: replaying a rollout through the unchanged student gives ratios of exactly 1, with a live gradient."""
    generator = torch.Generator().manual_seed(0)
    schedule, sigma_next = FlowSchedule(), torch.linspace(0.2, 0.8, 8)
    states, eps = (torch.randn(8, 64, generator=generator) for _ in range(2))
    weight = (torch.randn(64, 64, generator=generator) / 8).requires_grad_()

    with torch.no_grad():
        rollout = renoising_transition(schedule, (states @ weight).tanh(), sigma_next)
        x_next = step(rollout, eps)
        old = log_probability(rollout, x_next, reduction)
    new = log_probability(renoising_transition(schedule, (states @ weight).tanh(), sigma_next), x_next, reduction)
    ratio = importance_ratio(new, old)
    assert torch.equal(ratio, torch.ones(8))
    assert clip_fraction(ratio, 1e-6) == 0

    # At ratio 1 the gradient is that of the log-density: the on-policy policy gradient.
    advantage = torch.linspace(-1, 1, 8)
    (ours,) = torch.autograd.grad(clipped_surrogate(ratio, advantage, 0.1).sum(), weight, retain_graph=True)
    (policy_gradient,) = torch.autograd.grad((-advantage * new).sum(), weight)
    torch.testing.assert_close(ours, policy_gradient)
    assert ours.abs().max() > 0


def test_ratio_of_densities_beyond_the_float_range():
    """Law 4: the joint density of a latent under- or overflows; the ratio of two close ones does not."""
    log_density = torch.tensor([-90_000.0, 90_000.0])
    assert torch.equal(importance_ratio(log_density, log_density), torch.ones(2))
    torch.testing.assert_close(importance_ratio(log_density + 0.5, log_density), torch.full([2], math.exp(0.5)))


def test_old_log_probability_is_detached():
    """Law 4: no gradient reaches the policy that made the rollout."""
    new, old = (torch.zeros(3, requires_grad=True) for _ in range(2))
    through_new, through_old = torch.autograd.grad(importance_ratio(new, old).sum(), [new, old], allow_unused=True)
    assert through_new.tolist() == [1, 1, 1]
    assert through_old is None


def test_reweighted_samples_recover_the_shifted_mean():
    """Law 4: E_old[ratio] = 1 and E_old[ratio x] is the new mean, far from the old one."""
    samples, old, new, old_mean, new_mean = shifted_policies(dimensions=4, delta=0.3, std=0.5)
    ratio = importance_ratio(new, old)
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close((ratio[:, None] * samples).mean(0), new_mean, rtol=0, atol=0.02)
    assert (new_mean - old_mean).min() > 0.1
    backwards = importance_ratio(old, new)
    torch.testing.assert_close(backwards * ratio, torch.ones(NUM_SAMPLES))


@pytest.mark.parametrize(("dimensions", "delta"), [(1, 0.5), (4, 0.3), (16, 0.1), (16, 0.2)])
def test_effective_sample_size_of_a_shift(dimensions, delta):
    """Law 4: the effective sample size falls like exp(-D delta^2)."""
    _, old, new, *_ = shifted_policies(dimensions, delta, std=0.7)
    share = effective_sample_size(importance_ratio(new, old)) / NUM_SAMPLES
    assert share.item() == pytest.approx(math.exp(-dimensions * delta**2), rel=0.03)


def test_effective_sample_size_of_known_weights():
    """Law 4: equal weights count fully at any scale, one dominant weight counts once, zero weights do not count."""
    for weight in (1.0, 0.37, 1e-30):
        assert effective_sample_size(torch.full([12], weight)).item() == pytest.approx(12)
    assert effective_sample_size(torch.tensor([1e6, 1.0, 1.0])).item() == pytest.approx(1, abs=1e-5)
    assert effective_sample_size(torch.tensor([2.0, 2.0, 0.0, 0.0])).item() == pytest.approx(2)
    assert effective_sample_size(torch.tensor([1.0, 3.0])).item() == pytest.approx(1.6)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VariancePreservingSchedule()], ids=lambda s: type(s).__name__)
def test_log_probability_is_the_normal_density(schedule):
    """Law 4: "sum" is the joint log-density of N(alpha x_0, sigma^2 I); "mean" is that over the dimension."""
    generator = torch.Generator().manual_seed(1)
    x_0, x_next = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(2))
    sigma = torch.linspace(0.1, 0.9, 5)
    transition = renoising_transition(schedule, x_0, sigma)
    s = per_sample(sigma, x_0)
    alpha = 1 - s if isinstance(schedule, FlowSchedule) else (1 - s**2) ** 0.5
    expected = torch.distributions.Normal(alpha * x_0, s).log_prob(x_next).sum((1, 2, 3))
    torch.testing.assert_close(log_probability(transition, x_next), expected)
    torch.testing.assert_close(log_probability(transition, x_next, "sum"), expected)
    torch.testing.assert_close(log_probability(transition, x_next, "mean"), expected / 48)


def test_log_probability_is_float32_for_half_precision_states():
    """Law 4: states in half precision still get a float32 density, else every ratio is rounding noise."""
    mean = torch.full((2, 512), 0.1, dtype=torch.bfloat16)
    x_next = torch.full((2, 512), 0.3, dtype=torch.bfloat16)
    log_density = log_probability(Transition(mean, torch.full([2], 0.5, dtype=torch.bfloat16)), x_next)
    expected = torch.distributions.Normal(mean.float(), 0.5).log_prob(x_next.float()).sum(1)
    assert log_density.dtype == torch.float32
    torch.testing.assert_close(log_density, expected)


@pytest.mark.parametrize("std", [[0.0, 0.0], [0.5, 0.0]], ids=["all", "one"])
def test_deterministic_steps_have_no_density(std):
    """Law 4: std = 0 has no log-probability, not even for one sample of a batch."""
    transition = Transition(torch.zeros(2, 3), torch.tensor(std))
    with pytest.raises(ValueError, match="no density"):
        log_probability(transition, torch.zeros(2, 3))


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
