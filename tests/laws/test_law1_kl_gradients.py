"""Law 1: analytic, pathwise and score-function gradients of the KL between noised distributions agree."""

import pytest
import torch
from mixtures import GaussianMixture
from torch import Tensor

from rdm_sdk.method.groups import group_advantage
from rdm_sdk.method.importance import log_ratio
from rdm_sdk.method.losses import clipped_surrogate, pathwise_loss
from rdm_sdk.method.matching import matching_gradient
from rdm_sdk.method.noise import FlowSchedule, NoiseSchedule, VariancePreservingSchedule, add_noise, per_sample, score
from rdm_sdk.method.transitions import Transition, step

SCHEDULES = [FlowSchedule(), VariancePreservingSchedule()]
NUM_SAMPLES = 200_000


def teacher_mixture() -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.2, 0.3]),
        means=torch.tensor([[-1.0, 0.5], [1.2, 1.0], [0.3, -1.4]]),
        stds=torch.tensor([[0.4, 0.6], [0.5, 0.3], [0.3, 0.5]]),
    )


def student_mixture() -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.6, 0.4]),
        means=torch.tensor([[-0.4, 0.9], [0.9, -0.6]], requires_grad=True),
        stds=torch.tensor([[0.5, 0.4], [0.3, 0.6]]),
    )


def kl_field(schedule: NoiseSchedule, d_real: Tensor, d_fake: Tensor, sigma: Tensor) -> Tensor:
    """The x_0-form field without DMD's weight sigma^2 / alpha^2, so that it belongs to the plain KL."""
    weight = (schedule.alpha(sigma) / sigma).square()
    return per_sample(weight, d_real) * matching_gradient(d_real, d_fake)


def assert_agrees(estimate: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (estimate - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_gaussian_gradients_agree(schedule):
    """Law 1 on Gaussians: the three gradients agree for the generator's mean and its log-std, many sigmas at once."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.8, -0.3, 0.4], requires_grad=True)
    log_std = torch.tensor([-0.7, -1.2, -0.4], requires_grad=True)
    parameters = [mean, log_std]
    real_mean, real_std = torch.tensor([-0.2, 0.5, 0.1]), torch.tensor([0.9, 0.7, 0.4])
    sigma = torch.linspace(0.3, 0.7, NUM_SAMPLES)
    a = schedule.alpha(sigma)[:, None]

    variance = a.square() * (2 * log_std).exp() + sigma[:, None].square()
    real_variance = a.square() * real_std.square() + sigma[:, None].square()
    shift = a * (mean - real_mean)
    kl = 0.5 * ((variance + shift.square()) / real_variance - 1 - (variance / real_variance).log()).sum(1).mean()
    exact = torch.cat(torch.autograd.grad(kl, parameters))

    policy = Transition(mean.expand(NUM_SAMPLES, 3), torch.ones(NUM_SAMPLES))
    x_0 = step(policy, log_std.exp() * torch.randn(NUM_SAMPLES, 3, generator=generator))
    x_t = add_noise(schedule, x_0.detach(), torch.randn(NUM_SAMPLES, 3, generator=generator), sigma)
    real = GaussianMixture(torch.ones(1), real_mean[None], real_std[None])
    fake = GaussianMixture(torch.ones(1), mean.detach()[None], log_std.detach().exp()[None])
    field = kl_field(schedule, real.denoiser(schedule)(x_t, sigma), fake.denoiser(schedule)(x_t, sigma), sigma)
    # The loss is a mean over samples and dimensions; the KL sums over dimensions.
    pathwise = torch.cat(torch.autograd.grad(3 * pathwise_loss(x_0, field), parameters))
    assert_agrees(pathwise, exact, 0.02)

    reward = real.log_prob(schedule, x_t, sigma) - fake.log_prob(schedule, x_t, sigma)
    advantage = group_advantage(reward, group_size=NUM_SAMPLES, scale="none")
    # A deviation for each dimension: one transition per dimension, with samples in its rows.
    ratio = torch.zeros(NUM_SAMPLES)
    for d in range(3):
        own = Transition(mean[d].expand(NUM_SAMPLES, 1), log_std[d].exp().expand(NUM_SAMPLES))
        ratio = ratio + log_ratio(own, own, x_0[:, d : d + 1].detach())
    surrogate = clipped_surrogate(ratio.exp(), advantage, epsilon=0.2).mean()
    score_function = torch.cat(torch.autograd.grad(surrogate, parameters))
    assert_agrees(score_function, exact, 0.06)


@pytest.mark.parametrize("sigma_value", [0.35, 0.6])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_mixture_gradients_agree(schedule, sigma_value):
    """Law 1 on two-dimensional mixtures: the three gradients agree for every mean of the generator's components."""
    generator = torch.Generator().manual_seed(1)
    real, fake = teacher_mixture(), student_mixture()
    frozen = GaussianMixture(fake.weights, fake.means.detach(), fake.stds)

    # The KL of two mixtures has no closed form, but the trapezoidal rule is exact to rounding on smooth densities.
    axis, spacing = torch.linspace(-5, 5, 126), 10 / 125
    grid = torch.cartesian_prod(axis, axis)
    grid_sigma = torch.full([len(grid)], sigma_value)
    log_fake = fake.log_prob(schedule, grid, grid_sigma)
    difference = log_fake - real.log_prob(schedule, grid, grid_sigma)
    assert (log_fake.exp().sum() * spacing**2).item() == pytest.approx(1, abs=1e-4)
    kl = (log_fake.exp() * difference).sum() * spacing**2
    (exact,) = torch.autograd.grad(kl, fake.means)

    sigma = torch.full([NUM_SAMPLES], sigma_value)
    x_0 = fake.sample(NUM_SAMPLES, generator)
    x_t = add_noise(schedule, x_0.detach(), torch.randn(NUM_SAMPLES, 2, generator=generator), sigma)
    field = kl_field(schedule, real.denoiser(schedule)(x_t, sigma), frozen.denoiser(schedule)(x_t, sigma), sigma)
    (pathwise,) = torch.autograd.grad(2 * pathwise_loss(x_0, field), fake.means)
    assert_agrees(pathwise, exact, 0.04)

    reward = real.log_prob(schedule, x_t, sigma) - frozen.log_prob(schedule, x_t, sigma)
    advantage = group_advantage(reward, group_size=NUM_SAMPLES, scale="none")
    log_pi = fake.log_prob(schedule, x_0.detach(), torch.zeros(NUM_SAMPLES))
    surrogate = clipped_surrogate((log_pi - log_pi.detach()).exp(), advantage, epsilon=0.2).mean()
    (score_function,) = torch.autograd.grad(surrogate, fake.means)
    assert_agrees(score_function, exact, 0.06)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_score_of_the_optimal_denoiser(schedule):
    """Law 1's premise: `score` of the posterior mean is the gradient of log p, by closed form and by autograd."""
    generator = torch.Generator().manual_seed(2)
    mixture = teacher_mixture()
    x_t = (2 * torch.randn(64, 2, generator=generator)).requires_grad_()
    sigma = torch.linspace(0.1, 0.95, 64)
    (autograd,) = torch.autograd.grad(mixture.log_prob(schedule, x_t, sigma).sum(), x_t)
    from_denoiser = score(schedule, mixture.denoiser(schedule)(x_t, sigma), x_t, sigma)
    torch.testing.assert_close(from_denoiser, autograd, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mixture.score(schedule, x_t, sigma), autograd, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_matching_gradient_is_a_weighted_score_difference(schedule):
    """Law 1's weight: D_real - D_fake = w alpha (s_real - s_fake) with w = sigma^2 / alpha^2."""
    generator = torch.Generator().manual_seed(3)
    real, fake = teacher_mixture(), student_mixture()
    x_t, sigma = torch.randn(64, 2, generator=generator), torch.linspace(0.1, 0.9, 64)
    a = schedule.alpha(sigma)[:, None]
    weight = (sigma[:, None] / a).square()
    difference = real.score(schedule, x_t, sigma) - fake.score(schedule, x_t, sigma)
    d_real, d_fake = real.denoiser(schedule)(x_t, sigma), fake.denoiser(schedule)(x_t, sigma)
    torch.testing.assert_close(matching_gradient(d_real, d_fake), weight * a * difference, rtol=1e-3, atol=1e-4)
    from_core = score(schedule, d_real, x_t, sigma) - score(schedule, d_fake, x_t, sigma)
    torch.testing.assert_close(matching_gradient(d_real, d_fake), weight * a * from_core, rtol=1e-3, atol=1e-4)
