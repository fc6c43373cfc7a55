"""The score of distribution matching: an unbiased and noisy estimate of log p_real(x_0) - log p_fake(x_0)."""

import pytest
import torch
from mixtures import GaussianMixture

from rdm_sdk.method.draws import draw_uniform
from rdm_sdk.method.matching import matching_score, residual_magnitude
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule, add_noise

SCHEDULES = [FlowSchedule(), VariancePreservingSchedule()]
CPU = torch.device("cpu")


def gaussian(mean, std, dimensions, dtype):
    return GaussianMixture(
        torch.ones(1, dtype=dtype),
        torch.full((1, dimensions), mean, dtype=dtype),
        torch.full((1, dimensions), std, dtype=dtype),
    )


def score_draws(schedule, real, fake, x_0, eps, sigma, span):
    x_t = add_noise(schedule, x_0, eps, sigma)
    d_real, d_fake = real.denoiser(schedule)(x_t, sigma), fake.denoiser(schedule)(x_t, sigma)
    return matching_score(schedule, x_0, d_real, d_fake, sigma, span)


def exact_log_ratio(real, fake, x_0):
    clean = torch.zeros(len(x_0), dtype=x_0.dtype)
    return real.log_prob(FlowSchedule(), x_0, clean) - fake.log_prob(FlowSchedule(), x_0, clean)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_average_score_is_the_log_ratio(schedule):
    """The mean over sigma and eps equals the closed-form log-ratio of two Gaussians at every x_0."""
    torch.manual_seed(0)
    num_draws, low, high = 40_000, 1e-4, 1 - 1e-4
    real, fake = gaussian(0.5, 0.8, 3, torch.float64), gaussian(-0.1, 0.5, 3, torch.float64)
    for x_0 in ([0.2, 0.9, 1.4], [-0.8, 0.1, -0.3], [2.0, -1.0, 0.5]):
        points = torch.tensor(x_0, dtype=torch.float64).expand(num_draws, 3)
        sigma = low + (high - low) * draw_uniform("stratified", 1, num_draws, CPU).double()
        eps = torch.randn(num_draws, 3, dtype=torch.float64)
        # A draw and its mirror image: most of the noise is odd in eps.
        scores = [score_draws(schedule, real, fake, points, e, sigma, high - low) for e in (eps, -eps)]
        exact = exact_log_ratio(real, fake, points[:1]).item()
        assert abs(exact) > 0.5
        assert torch.stack(scores).mean().item() == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_correlation_rises_with_draws(schedule):
    """More draws of (sigma, eps) tell samples apart better: the correlation with the exact log-ratio rises."""
    torch.manual_seed(1)
    num_samples, dimensions, low, high = 500, 16, 0.02, 0.98
    real, fake = gaussian(0.2, 1.0, dimensions, torch.float32), gaussian(0.0, 0.8, dimensions, torch.float32)
    x_0 = 0.8 * torch.randn(num_samples, dimensions)
    exact = exact_log_ratio(real, fake, x_0)

    def correlation(num_draws):
        repeated = x_0.repeat_interleave(num_draws, 0)
        sigma = low + (high - low) * torch.rand(len(repeated))
        scores = score_draws(schedule, real, fake, repeated, torch.randn_like(repeated), sigma, high - low)
        return torch.corrcoef(torch.stack([scores.reshape(num_samples, num_draws).mean(1), exact]))[0, 1].item()

    one, four, sixteen, many = (correlation(n) for n in (1, 4, 16, 64))
    assert 0 < one < four < sixteen < many
    assert one < 0.6 < many


def test_score_prefers_the_better_model():
    """A positive score says that the real denoiser explains the sample better; equal denoisers score 0."""
    x_0 = torch.zeros(2, 3, 4)
    near, far = torch.full((2, 3, 4), 0.1), torch.full((2, 3, 4), 0.2)
    sigma = torch.tensor([0.25, 0.5])
    # Flow schedule, by hand: 1/2 (alpha / sigma)^2 * 2 / (sigma alpha) * span * 12 * (0.2^2 - 0.1^2).
    expected = 0.5 * torch.tensor([9.0, 1.0]) * torch.tensor([2 / 0.1875, 8.0]) * 0.9 * 12 * 0.03
    torch.testing.assert_close(matching_score(FlowSchedule(), x_0, near, far, sigma, 0.9), expected)
    torch.testing.assert_close(matching_score(FlowSchedule(), x_0, far, near, sigma, 0.9), -expected)
    assert matching_score(FlowSchedule(), x_0, near, near, sigma, 0.9).tolist() == [0, 0]


def test_residual_magnitude_is_the_mean_absolute_residual():
    """The magnitude that DMD2 divides by is a mean over all of a sample's dimensions, without a sign."""
    x_0 = torch.zeros(2, 2, 2)
    d_real = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[0.0, -4.0], [0.0, 0.0]]])
    assert residual_magnitude(x_0, d_real).tolist() == [1.0, 1.0]
