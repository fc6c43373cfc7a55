"""Law 10: told critics, and a noise range per step, give each step the teacher's marginal; one critic for all does not.

Closed form throughout: the samples of each step are a Gaussian, the critics are exact, and the student's parameters are
the means and deviations themselves.
"""

import pytest
import torch
from mixtures import GaussianMixture

from rdm_sdk.method.matching import matching_gradient
from rdm_sdk.method.noise import FlowSchedule, add_noise
from rdm_sdk.method.sampling import FewStepPolicy

SCHEDULE = FlowSchedule()
POLICY = FewStepPolicy(SCHEDULE, (1.0, 0.5))
MATCHINGS = ["step", "range", "mixture"]
by_matching = pytest.mark.parametrize("matching", MATCHINGS)


def mixture(means, stds):
    """Return an even mixture of one-dimensional Gaussians."""
    return GaussianMixture(torch.full((len(means),), 1 / len(means)), means[:, None], stds[:, None])


def pull(matching, teacher, means, stds, count=4000):
    """Return the gradient of R_dm at samples of both steps: x_0 `[2 count, 1]`, their steps, the field.

    `means` and `stds` `[2]` are those of the two steps' samples. The critic is the exact one for what it can tell
    apart: the step itself, the step by its range of noise levels, or nothing.
    """
    steps = torch.arange(2).repeat_interleave(count)
    x_0 = means[steps, None] + stds[steps, None] * torch.randn(2 * count, 1)
    low, high = torch.full((2 * count,), 0.02), torch.full((2 * count,), 0.98)
    if matching == "range":
        low, high = (end.clamp(0.02, 0.98) for end in POLICY.times(steps))
    sigma = SCHEDULE.levels(torch.rand(2 * count), low, high)
    x_t = add_noise(SCHEDULE, x_0.detach(), torch.randn_like(x_0), sigma)
    own = [mixture(means[k : k + 1].detach(), stds[k : k + 1].detach()).denoiser(SCHEDULE) for k in range(2)]
    both = mixture(means.detach(), stds.detach()).denoiser(SCHEDULE)
    told = {"step": steps, "range": (sigma < POLICY.sigmas[1]).long()}.get(matching)
    if told is None:
        fake = both(x_t, sigma)
    else:
        fake = torch.where((told == 0)[:, None], own[0](x_t, sigma), own[1](x_t, sigma))
    return x_0, steps, matching_gradient(teacher.denoiser(SCHEDULE)(x_t, sigma), fake)


@by_matching
def test_steps_that_only_match_together(matching):
    """Two steps that have half of the teacher each: their mixture is the teacher, neither of them is."""
    torch.manual_seed(0)
    means, stds = torch.tensor([-1.0, 1.0]), torch.tensor([0.4, 0.4])
    _, _, field = pull(matching, mixture(means, stds), means, stds)
    strength = field.abs().mean()
    if matching == "mixture":
        assert strength < 1e-6  # the critic sees nothing to mend
    else:
        assert strength > 0.1


@by_matching
def test_where_training_ends(matching):
    """Gradient ascent from two poor steps: each becomes the teacher's marginal, or the mixture alone does."""
    torch.manual_seed(1)
    teacher = mixture(torch.tensor([0.0]), torch.tensor([1.0]))
    means = torch.tensor([-0.9, 0.9], requires_grad=True)
    stds = torch.tensor([0.5, 0.5], requires_grad=True)
    optimizer = torch.optim.Adam([means, stds], lr=0.02)
    for _ in range(400):
        x_0, _, field = pull(matching, teacher, means, stds, 500)
        optimizer.zero_grad()
        (-(field * x_0).mean()).backward()
        optimizer.step()
    means, stds = means.detach(), stds.detach()
    whole_mean, whole_variance = means.mean(), stds.square().mean() + means.var(correction=0)
    assert whole_mean.abs() < 0.1
    assert abs(whole_variance - 1) < 0.15
    if matching == "mixture":
        assert (means[1] - means[0]).abs() > 0.5
    else:
        torch.testing.assert_close(means, torch.zeros(2), rtol=0, atol=0.1)
        torch.testing.assert_close(stds, torch.ones(2), rtol=0, atol=0.1)
