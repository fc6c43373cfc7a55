"""Rewards that act by tilting the teacher: what they add to D_real instead of where they push x_0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rdm_sdk.method.groups import ScoreScale, alone, group_advantage, group_scale
from rdm_sdk.method.matching import residual_magnitude
from rdm_sdk.method.noise import per_sample
from rdm_sdk.method.tilting import group_covariance
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import TEACHER, Renoised
from rdm_sdk.types import RewardOutput


def tilted(
    output: RewardOutput, batch: RewardBatch, scale: ScoreScale, total: Callable[[Tensor], Tensor] = alone
) -> RewardOutput:
    """Return what a reward does to the teacher's denoiser, in place of its gradient at x_0.

    With a weight of lambda, `dm` and this field together match the student to p_real exp(lambda r / deviation) in place
    of p_real, to first order in lambda (`method.tilting`). It stands beside D_real - D_fake, so it is taken at the
    same noise and measured against the same |x_0 - D_real|.

    A reward with a gradient is carried through the teacher's Jacobian, and its deviation is that under the teacher's
    posterior, the root of grad r Cov grad r. One without is seen through the covariance of its group, and its deviation
    is that of the group's scores. `scale` says over what the deviation is taken: "group", "batch", or "none" for
    rewards in native units. `total` adds a tensor up over the processes of a run: "batch" is over all of them.
    """
    context, size = batch.require_context("a tilt"), batch.group_size
    renoised = context.renoise(batch.latents, size)
    if output.gradient is not None:
        field = _by_gradient(output.gradient, output.scores, renoised, size, scale, total)
    else:
        advantage = group_advantage(output.scores, size, scale, total=total)
        advantage = advantage.masked_fill(output.scores.isnan(), torch.nan)
        field = group_covariance(context.schedule, renoised.x_t, renoised.sigma, batch.latents, advantage, size)
    return replace(output, gradient=field, magnitude=residual_magnitude(batch.latents, renoised.x_0(TEACHER)))


def _by_gradient(
    gradient: Tensor,
    scores: Tensor,
    renoised: Renoised,
    group_size: int,
    scale: ScoreScale,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    field = renoised.carry_back(gradient)
    if scale == "none":
        return field
    # A network's Jacobian is only nearly symmetric and positive, so a sample's variance can come out negative.
    variance = (gradient * field).flatten(1).sum(1).abs().masked_fill(scores.isnan(), torch.nan)
    deviation = group_scale(variance, group_size, scale, total).sqrt()
    return field / per_sample(deviation.clamp_min(torch.finfo(torch.float32).eps), field)
