"""Distribution matching as a reward: its gradient, its score and the loss of its critic.

R_dm(x_0 | c) = E_{sigma, eps}[ w(sigma) (log p_real(x_t | c) - log p_fake(x_t | c)) ]; its expectation is minus the KL
divergence summed over noise levels (arXiv 2603.28460; the forms below are our reading, see docs/method.md).
"""

from __future__ import annotations

from torch import Tensor

from rdm_sdk.core.noise import NoiseSchedule, per_sample


def matching_gradient(d_real: Tensor, d_fake: Tensor) -> Tensor:
    """Return the gradient of R_dm in x_0 form, D_real(x_t) - D_fake(x_t), `[N, *x]`.

    It is w alpha (s_real - s_fake) for w = sigma^2 / alpha^2, the weight that DMD's x_0 form implies (arXiv
    2311.18828, 2405.14867): an ascent direction of R_dm, so a descent direction of the KL.
    """
    return d_real - d_fake


def residual_magnitude(x_0: Tensor, d_real: Tensor) -> Tensor:
    """Return mean |x_0 - D_real(x_t)| per sample, `[N]`: the scale by which DMD2 divides its gradient."""
    return (x_0 - d_real).abs().flatten(1).mean(1)


def matching_score(
    schedule: NoiseSchedule, x_0: Tensor, d_real: Tensor, d_fake: Tensor, sigma: Tensor, sigma_span: float
) -> Tensor:
    """Estimate log p_real(x_0) - log p_fake(x_0) from one draw of (sigma, eps), `[N]`.

    Half the log-SNR integral of the difference of squared noise errors, 1/2 E_lambda[|eps - eps_fake|^2 -
    |eps - eps_real|^2] (the diffusion likelihood of arXiv 2107.00630 for both models), with eps errors written
    as (alpha / sigma) times x_0 errors. `sigma` `[N]` must be uniform on an interval of length `sigma_span`. Unbiased
    for that interval and very noisy: use it for logs and, averaged or centered in a group, as a score.
    """
    a = schedule.alpha(sigma)
    per_eps = (a / sigma).square() * schedule.log_snr_rate(sigma) * sigma_span
    error_fake = (x_0 - d_fake).square().flatten(1).sum(1)
    error_real = (x_0 - d_real).square().flatten(1).sum(1)
    return 0.5 * per_eps * (error_fake - error_real)


def denoising_loss(schedule: NoiseSchedule, x_0: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """Return the critic's loss per sample `[N]`: the mean squared error of the schedule's native prediction.

    `x_0` are the clean samples `[N, *x]`, `denoised` the critic's x_0 at noise level `sigma` `[N]`.
    """
    weight = per_sample(schedule.loss_weight(sigma), x_0)
    return (weight * (denoised - x_0).square()).flatten(1).mean(1)
