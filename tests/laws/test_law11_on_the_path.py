"""Law 11: on a deterministic student's own path, what is left of the gradient pulls the mean and not the scale.

Closed form throughout: teacher and student are Gaussians in many dimensions, the critic is exact for fresh noise, and
the student's only step is affine, x_0 = mean + scale * noise.
"""

import pytest
import torch
from mixtures import GaussianMixture

from rdm_sdk.method.matching import across, matching_gradient
from rdm_sdk.method.noise import FlowSchedule, add_noise

SCHEDULE, SIZE = FlowSchedule(), 64


def gradients(mean, scale, count=2000):
    """Return D_real - D_fake `[count, SIZE]` where a student of the standard normal teacher goes, whole and across."""
    torch.manual_seed(0)
    noise = torch.randn(count, SIZE, dtype=torch.float64)  # the residual passes through zero in a student that scatters
    x_0 = mean + scale * noise
    sigma = 0.5 + 0.5 * torch.rand(count, dtype=torch.float64)
    x_t = add_noise(SCHEDULE, x_0, noise, sigma)

    def known(center, deviation):
        weight, one = torch.ones(1, dtype=torch.float64), torch.ones(1, SIZE, dtype=torch.float64)
        return GaussianMixture(weight, center[None], deviation * one).denoiser(SCHEDULE)(x_t, sigma)

    fake = known(mean, scale)
    whole = matching_gradient(known(torch.zeros_like(mean), 1.0), fake)
    return whole, across(whole, x_0 - fake)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
def test_the_mean_is_pulled_straight_to_the_teacher_s(scale):
    """On average the gradient leads from the student's mean to the teacher's, whatever the scale."""
    mean = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    pull = gradients(mean, scale)[1].mean(0)
    assert torch.cosine_similarity(pull, -mean, dim=0) > 0.99
    assert 0.3 < (pull @ -mean) / mean.square().sum() < 1


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_the_scale_is_not_seen(scale):
    """All that says it lies along the critic's residual; at fresh noise, and without the projection, it is seen."""
    whole, across_it = gradients(torch.zeros(SIZE, dtype=torch.float64), scale)
    assert whole.abs().mean() > 0.05
    assert across_it.abs().max() < 1e-5


def test_at_the_teacher_nothing_is_left():
    whole, across_it = gradients(torch.zeros(SIZE, dtype=torch.float64), 1.0)
    assert whole.abs().max() < 1e-5
    assert across_it.abs().max() < 1e-5
