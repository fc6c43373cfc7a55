"""Tilting a distribution by a reward moves its denoiser by the covariance of samples and reward."""

import pytest
import torch
from mixtures import GaussianMixture
from torch import Tensor

from rdm_sdk.method.noise import FlowSchedule, NoiseSchedule, VariancePreservingSchedule, add_noise
from rdm_sdk.method.tilting import group_covariance, posterior_covariance

SCHEDULES = [FlowSchedule(), VariancePreservingSchedule()]
SLOPE = torch.tensor([0.7, -0.4], dtype=torch.float64)
"""The reward is SLOPE . x_0, so that the tilted mixture is a mixture again."""


def tilted_mixture(strength: float) -> GaussianMixture:
    """Return p(x_0) exp(strength r(x_0)), normalized."""
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [1.2, 1.0], [0.3, -1.4]], dtype=torch.float64)
    stds = torch.tensor([[0.4, 0.6], [0.5, 0.3], [0.3, 0.5]], dtype=torch.float64)
    tilt = strength * SLOPE
    log_weights = weights.log() + means @ tilt + 0.5 * stds.square() @ tilt.square()
    return GaussianMixture(log_weights.softmax(0), means + stds.square() * tilt, stds)


def denoiser_slope(schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return d D_lambda(x_t) / d lambda at 0 of the tilted mixtures, by central differences."""
    step = 1e-4
    up, down = (tilted_mixture(s).denoiser(schedule)(x_t, sigma) for s in (step, -step))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_jacobian_gives_the_tilt(schedule: NoiseSchedule) -> None:
    """Carried through an exact denoiser, a linear reward's gradient is exactly the tilted denoiser's derivative."""
    generator = torch.Generator().manual_seed(0)
    x_0 = tilted_mixture(0.0).sample(500, generator)
    sigma = torch.linspace(0.05, 0.95, 500, dtype=torch.float64)
    noise = torch.randn(500, 2, dtype=torch.float64, generator=generator)
    x_t = add_noise(schedule, x_0, noise, sigma).requires_grad_()
    denoised = tilted_mixture(0.0).denoiser(schedule)(x_t, sigma)
    (pulled,) = torch.autograd.grad(denoised, x_t, SLOPE.expand_as(x_t))
    field = posterior_covariance(schedule, pulled, sigma)
    torch.testing.assert_close(field, denoiser_slope(schedule, x_t.detach(), sigma), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_large_group_gives_the_tilt(schedule: NoiseSchedule) -> None:
    """From scores alone, and without any model; at levels where Bayes' rule is wider than the bound on the width."""
    generator = torch.Generator().manual_seed(1)
    count = 4000
    x_0 = tilted_mixture(0.0).sample(count, generator)
    sigma = torch.full((count,), 0.98, dtype=torch.float64)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    x_t = add_noise(schedule, x_0, noise, sigma)
    field = group_covariance(schedule, x_t, sigma, x_0, x_0 @ SLOPE, count)
    exact = denoiser_slope(schedule, x_t, sigma)
    assert (field - exact).norm() < 0.05 * exact.norm()


def test_the_tilt_raises_the_reward_and_the_gradient_alone_does_not_say_how_far() -> None:
    """Between narrow modes a tilt is small along the gradient; the covariance knows, the gradient does not."""
    narrow = GaussianMixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64),
        torch.full((2, 2), 0.05, dtype=torch.float64),
    )
    schedule = FlowSchedule()
    x_t = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    denoised = narrow.denoiser(schedule)(x_t, sigma)
    gradient = torch.ones(1, 2, dtype=torch.float64)  # as much along the modes' narrow side as between them
    (pulled,) = torch.autograd.grad(denoised, x_t, gradient)
    across, between = posterior_covariance(schedule, pulled, sigma)[0].tolist()
    assert between == pytest.approx(1.0, abs=0.02)  # the variance of a choice between two modes
    assert 0 < across < 0.003  # that of one mode, 0.05 squared
