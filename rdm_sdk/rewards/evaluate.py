"""Evaluating any reward on a batch, by what it declares and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.types import RewardOutput


def evaluate_reward(reward: Reward, batch: RewardBatch) -> RewardOutput:
    """Return scores `[N]` and, if the reward has one, its gradient with respect to the latents `[N, *x]`.

    Raises:
        RewardError: the reward returned something of the wrong shape, an infinite score, only NaN, or a gradient that
            is not finite. Nothing is repaired: a reward that returns nonsense must not train a model.
    """
    kind = reward.capabilities.gradient
    if kind == "field":
        output = reward.field(batch)
    elif kind == "autograd":
        output = _differentiate(reward, batch)
    else:
        with torch.no_grad():
            output = RewardOutput(reward.score(batch))
    return _checked(reward, batch, output)


def _differentiate(reward: Reward, batch: RewardBatch) -> RewardOutput:
    if reward.capabilities.space == "latent":
        leaf = batch.latents.detach().requires_grad_()
        judged = batch.with_latents(leaf)
    else:
        # Decode with a graph before the images are asked for, so that they are decoded once.
        leaf = batch._decoded[1].detach().requires_grad_()
        judged = batch.with_images(leaf)
    scores = reward.score(judged)
    if not scores.requires_grad:
        raise RewardError(
            f"reward {reward.name!r} declares gradient='autograd', but its scores carry no gradient: remove no_grad, "
            "detach, PIL or NumPy from score(), or declare gradient='none'"
        )
    (gradient,) = torch.autograd.grad(scores.nansum(), leaf)
    if reward.capabilities.space == "pixel":
        gradient = batch.pull_back(gradient)
    return RewardOutput(scores.detach(), gradient)


def _checked(reward: Reward, batch: RewardBatch, output: RewardOutput) -> RewardOutput:
    count = len(batch.prompts)
    scores = output.scores.detach().to(batch.latents.device, torch.float32)
    if scores.shape != (count,):
        raise RewardError(
            f"reward {reward.name!r} must return one score per sample, shape [{count}]; got {list(scores.shape)}"
        )
    if scores.isinf().any():
        raise RewardError(f"reward {reward.name!r} returned an infinite score: {_shown(scores)}")
    if scores.isnan().all():
        if reward.capabilities.trains:
            raise RewardError(
                f"reward {reward.name!r} is NaN for every sample: its {reward.capabilities.trains!r} role or the "
                "student has diverged; lower critic_learning_rate or learning_rate"
            )
        raise RewardError(
            f"reward {reward.name!r} returned NaN (not applicable) for every sample; first prompt: {batch.prompts[0]!r}"
        )
    gradient = output.gradient
    if gradient is not None:
        if gradient.shape != batch.latents.shape:
            raise RewardError(
                f"reward {reward.name!r} must return a gradient of the latents' shape {list(batch.latents.shape)}; "
                f"got {list(gradient.shape)}"
            )
        if not bool(gradient.isfinite().all()):
            raise RewardError(f"reward {reward.name!r} returned a gradient that is not finite")
    return RewardOutput(scores, gradient, output.magnitude)


def _shown(scores: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in scores[:8].tolist()) + (", ..." if len(scores) > 8 else "")
