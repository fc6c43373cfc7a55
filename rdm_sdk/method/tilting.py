"""How a distribution's denoiser moves when a reward tilts the distribution: the covariance of samples and reward.

Tilting p(x_0) by exp(lambda r(x_0)) moves its denoiser D(x_t) = E[x_0 | x_t] by lambda Cov(x_0, r | x_t) to first
order, the derivative of E[x_0 exp(lambda r) | x_t] / E[exp(lambda r) | x_t] at lambda = 0. Distribution matching
compares denoisers, so this, and not the gradient of r at x_0, is what a reward adds to D_real - D_fake. The step from
the one to the other is ours; arXiv 2603.28460's abstract says nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk.method.groups import in_groups
from rdm_sdk.method.noise import NoiseSchedule, per_sample


def posterior_covariance(schedule: NoiseSchedule, pulled_back: Tensor, sigma: Tensor) -> Tensor:
    """Return Cov(x_0 | x_t) v from v^T dD/dx_t, `[N, *x]`, which is what automatic differentiation of a denoiser gives.

    For an exact denoiser Cov(x_0 | x_t) = (sigma^2 / alpha) dD/dx_t (the second-order Tweedie formula), a symmetric
    matrix. With v = grad r it is Cov(x_0, r | x_t) for rewards that are linear over the width of the posterior.

    Args:
        schedule: of the noise.
        pulled_back: the vector-Jacobian product, `[N, *x]`.
        sigma: noise levels of x_t, `[N]`, with alpha(sigma) > 0.
    """
    return per_sample(sigma.square() / schedule.alpha(sigma), pulled_back) * pulled_back


def group_covariance(
    schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor, x_0: Tensor, scores: Tensor, group_size: int
) -> Tensor:
    """Estimate Cov(x_0, r | x_t) of each sample from its group, `[N, *x]`; no gradient of r is needed.

    The samples x_0 of a group stand for their distribution. Given x_t, sample j has the posterior weight
    w_j ~ exp(-|x_t / alpha - x_j|^2 / h) with h = 2 (sigma / alpha)^2 (Bayes' rule), and the covariance under these
    weights is sum_j w_j (r_j - sum w r)(x_j - sum w x). In many dimensions one sample would have all the weight at all
    but the highest noise levels, and the covariance vanish, so h is at least the deviation of the squared distances.

    Args:
        schedule: of the noise.
        x_t: re-noised samples, `[N, *x]`, group-major.
        sigma: their noise levels, `[N]`, with alpha(sigma) > 0.
        x_0: the samples, `[N, *x]`.
        scores: `[N]`. A NaN is in no covariance, and its own sample gets 0, as do all samples of a constant group.
        group_size: samples per group.

    Raises:
        ValueError: N is not a multiple of `group_size`.
    """
    points = in_groups(x_0, group_size).flatten(2)  # [P, G, D]
    alpha = schedule.alpha(sigma)
    seen = per_sample(1 / alpha, x_t) * x_t
    distances = torch.cdist(seen.reshape_as(points), points).square()  # [P, G of x_t, G of x_0]
    width = 2 * (sigma / alpha).square().reshape(-1, group_size, 1)
    grouped = scores.reshape(-1, 1, group_size)
    missing = grouped.isnan()
    count = (~missing).sum(2, keepdim=True).clamp_min(1)
    mean = distances.masked_fill(missing, 0.0).sum(2, keepdim=True) / count
    scatter = (distances - mean).square().masked_fill(missing, 0.0).sum(2, keepdim=True)
    deviation = (scatter / (count - 1).clamp_min(1)).sqrt()
    weights = torch.softmax((-distances / torch.maximum(width, deviation)).masked_fill(missing, -torch.inf), 2)
    rewards = grouped.masked_fill(missing, 0.0)
    centered = weights * (rewards - (weights * rewards).sum(2, keepdim=True))
    # sum_j w_j (r_j - mean r) x_j: these coefficients sum to zero, so x need not be centered.
    covariance = (centered @ points).reshape(x_0.shape)
    return covariance.masked_fill(per_sample(scores.isnan(), covariance), 0.0)
