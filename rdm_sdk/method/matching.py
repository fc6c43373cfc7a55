"""Distribution matching as a reward: its gradient, its score and the loss of its critic.

R_dm(x_0 | c) = E_{sigma, eps}[ w(sigma) (log p_real(x_t | c) - log p_fake(x_t | c)) ]; its expectation is minus the KL
divergence summed over noise levels (arXiv 2603.28460; the forms below are our reading, see docs/method.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk.method.groups import in_groups
from rdm_sdk.method.noise import NoiseSchedule, per_sample


def matching_gradient(d_real: Tensor, d_fake: Tensor) -> Tensor:
    """Return the gradient of R_dm in x_0 form, D_real(x_t) - D_fake(x_t), `[N, *x]`.

    It is w alpha (s_real - s_fake) for w = sigma^2 / alpha^2, the weight that DMD's x_0 form implies (arXiv
    2311.18828, 2405.14867): an ascent direction of R_dm, so a descent direction of the KL.
    """
    return d_real - d_fake


def across(vectors: Tensor, direction: Tensor) -> Tensor:
    """Return vectors `[N, *x]` without the part of each that lies along the direction `[N, *x]` of its own sample.

    Of D_real - D_fake and the critic's residual x_0 - D_fake it is PDMD's gradient (arXiv 2609.35768; the formula is
    that of a public implementation). A direction of zero takes nothing away.
    """
    flat, line = vectors.flatten(1), direction.flatten(1)
    square = line.square().sum(1, keepdim=True)
    share = (flat * line).sum(1, keepdim=True) / square.clamp_min(torch.finfo(square.dtype).tiny)
    return (flat - share * line).reshape(vectors.shape)


def classifier_free_guidance(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return without + scale (with_prompt - without), `[N, *x]`; a scale of 1 is none (arXiv 2207.12598).

    The predictions may be of x_0, of the noise or of the flow: the three are affine in each other.
    """
    return without + scale * (with_prompt - without)


def critic_lag(residual: Tensor, profile: Tensor, group_size: int) -> Tensor:
    """Return how far the critic lags behind the student, as the group's other samples show it, `[N, *x]`.

    For an exact critic D_fake(x_t) = E[x_0 | x_t], so the residuals x_0 - D_fake(x_t) of a group have mean zero; a mean
    that stands out from their scatter is the critic's error, and D_real - D_fake is off by as much. The lag is
    modeled as `profile_i b` with one b `[*x]` per group. For Gaussian data of unit variance the profile is also the
    residual's variance, so that the best linear estimate (generalized least squares) is the ratio of two means,
    b = sum_j r_j / sum_j profile_j. It is shrunk toward zero by the positive-part James-Stein rule, 1 - Var(b) / |b|^2
    with Var(b) from the scatter. Adding the lag to D_fake pulls the group's mean straight toward the teacher's,
    D_real - x_0, as far as the critic cannot be trusted with it. This is our reading of "group-mean statistics" (arXiv
    2603.28460), not a formula of the paper.

    Each sample's lag is fitted on the others of its group alone: with its own residual in the mean, which pulls it a
    little toward its own denoised mean, the correction would be biased and narrow the student (docs/study.md).

    Args:
        residual: x_0 - D_fake(x_t), `[N, *x]`, group-major.
        profile: how the lag grows with noise, `[N]`; see `lag_profile`.
        group_size: samples per group; fewer than three, whose others have no scatter, get no correction.

    Raises:
        ValueError: N is not a multiple of `group_size`.
    """
    grouped = in_groups(residual, group_size).flatten(2)  # [P, G, D]
    counted = group_size - 1
    if counted < 2:
        return torch.zeros_like(residual)

    def total(values: Tensor) -> Tensor:
        """Return each sample's sum over the others of its group."""
        return values.sum(1, keepdim=True) - values

    shape = profile.reshape(-1, group_size, 1)
    weight = total(shape)  # [P, G, 1]
    lag = total(grouped) / weight  # [P, G, D]
    size = lag.square().sum(2, keepdim=True)
    # The sum of |r - shape b|^2, multiplied out, because b differs from sample to sample.
    scatter = (
        total(grouped.square().sum(2, keepdim=True))
        - 2 * (lag * total(shape * grouped)).sum(2, keepdim=True)
        + size * total(shape.square())
    ).clamp_min(0)
    variance = scatter / weight.square() * (counted / (counted - 1))
    kept = (1 - variance / size.clamp_min(torch.finfo(lag.dtype).tiny)).clamp_min(0)
    return (kept * shape * lag).reshape(residual.shape)


def shared_square(values: Tensor, group_size: int) -> Tensor:
    """Return the square of what a group's samples have in common, per value: `[N]`, unbiased, so it may be negative.

    The mean over dimensions of v_i times the mean of the other v_j; its expectation is |E v|^2 / D where the samples
    of a group are independent (a U-statistic). Of residuals x_0 - D_fake(x_t) it is 0 for an exact critic, whatever
    their scatter, and grows as the critic lags behind.

    Args:
        values: `[N, *x]`, group-major.
        group_size: samples per group, two or more.

    Raises:
        ValueError: N is not a multiple of `group_size`, or there is no other sample in a group.
    """
    grouped = in_groups(values.float(), group_size, least=2).flatten(2)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped * others).mean(2).flatten()


def lag_profile(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """Return sigma^2 / (alpha^2 + sigma^2) `[N]`: how far D(x_t) moves when data of unit variance shift by one.

    For a Gaussian with mean mu, D(x_t) = mu + alpha / (alpha^2 + sigma^2) (x_t - alpha mu); this is its slope in mu.
    """
    power = sigma.square()
    return power / (schedule.alpha(sigma).square() + power)


def residual_magnitude(x_0: Tensor, d_real: Tensor) -> Tensor:
    """Return mean |x_0 - D_real(x_t)| per sample, `[N]`: the scale by which DMD2 divides its gradient."""
    return (x_0 - d_real).abs().flatten(1).mean(1)


def matching_score(
    schedule: NoiseSchedule, x_0: Tensor, d_real: Tensor, d_fake: Tensor, sigma: Tensor, span: Tensor | float
) -> Tensor:
    """Estimate log p_real(x_0) - log p_fake(x_0) from one draw of (sigma, eps), `[N]`.

    Half the log-SNR integral of the difference of squared noise errors, 1/2 E_lambda[|eps - eps_fake|^2 -
    |eps - eps_real|^2] (the diffusion likelihood of arXiv 2107.00630 for both models), with eps errors written
    as (alpha / sigma) times x_0 errors. The times of `sigma` `[N]` must be uniform on intervals of length `span`
    (`[N]`, or one for all). Unbiased for these intervals and very noisy: use it for logs and, averaged or centered in a
    group, as a score.
    """
    a = schedule.alpha(sigma)
    per_eps = (a / sigma).square() * schedule.log_snr_rate(sigma) * span
    error_fake = (x_0 - d_fake).square().flatten(1).sum(1)
    error_real = (x_0 - d_real).square().flatten(1).sum(1)
    return 0.5 * per_eps * (error_fake - error_real)


def denoising_loss(schedule: NoiseSchedule, x_0: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """Return the critic's loss per sample `[N]`: the mean squared error of the schedule's native prediction.

    `x_0` are the clean samples `[N, *x]`, `denoised` the critic's x_0 at noise level `sigma` `[N]`.
    """
    weight = per_sample(schedule.loss_weight(sigma), x_0)
    return (weight * (denoised - x_0).square()).flatten(1).mean(1)
