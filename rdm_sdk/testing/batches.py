"""Batches to try rewards on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rdm_sdk.errors import RewardError
from rdm_sdk.method.noise import FlowSchedule, per_sample
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.context import DiffusionContext, Origin
from rdm_sdk.types import Denoiser

PROMPTS = ("a red fox in the snow", "two boats at night", "an old wooden chair", "a bowl of green apples")
GROUP_SIZE = 2
LATENT_CHANNELS = 4
"""Channels of the made-up latents, and so the width of the made-up teacher's features."""


def example_images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Return random RGB images `[count, 3, height, width]` inside (0, 1): smooth patches with some grain."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
    grain = torch.rand(count, 3, height, width, generator=generator)
    return 0.1 + 0.7 * smooth + 0.1 * grain


def example_batch(reward: Reward, height: int = 64, width: int = 64, seed: int = 0) -> RewardBatch:
    """Return random samples of the space that a reward reads: eight, two per prompt, with pictures as column "image".

    Latents come with a diffusion context whose teacher and critic are the exact denoisers of two Gaussians, so that
    rewards which read the run's models have something sound to read.
    """
    unknown = [name for name in reward.capabilities.columns if name != "image"]
    if unknown:
        names = ", ".join(unknown)
        raise RewardError(
            f"reward {reward.name!r} needs the columns {names}: write example(self), which returns a RewardBatch that "
            "has them, such as RewardBatch.from_images(images, prompts, 2, columns)"
        )
    count = GROUP_SIZE * len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    columns: dict[str, list[object]] = {}
    if "image" in reward.capabilities.columns:
        columns["image"] = list(example_images(count, height, width, seed + 1))
    if reward.capabilities.space == "pixel":
        return RewardBatch.from_images(example_images(count, height, width, seed), prompts, GROUP_SIZE, columns)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, LATENT_CHANNELS, height // 8, width // 8, generator=generator)
    return RewardBatch(
        latents=latents,
        prompts=prompts,
        group_size=GROUP_SIZE,
        decode=_decode,
        columns=columns,
        context=gaussian_context(latents),
    )


def gaussian_context(latents: Tensor) -> DiffusionContext:
    """Return a context in which teacher and critic know data of mean 1 and -1 and unit variance, exactly.

    Without the prompt, the teacher's mean is 0; its features are the noised pixels themselves. The latents `[N, *x]`
    are the student's predictions in its last step, from states as noisy as 0.25.
    """
    means = {"teacher": 1.0, "fake": -1.0, "unprompted": 0.0}

    def denoiser(role: str) -> Denoiser:
        def posterior_mean(x_t: Tensor, sigma: Tensor) -> Tensor:
            sigma = per_sample(sigma, x_t)
            alpha = 1 - sigma
            return means[role] + alpha / (alpha**2 + sigma**2) * (x_t - alpha * means[role])

        return posterior_mean

    def pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return denoiser("teacher")(x_t, sigma), denoiser("unprompted")(x_t, sigma)

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    levels = torch.full((len(latents),), 0.25)
    left = torch.zeros(len(latents), dtype=torch.long)
    return DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=denoiser,
        origin=Origin(0.75 * latents + 0.25 * noise, levels, left, lambda rows: denoiser("teacher")),
        min_time=0.02,
        max_time=0.98,
        denoiser_pair=pair,
        features=lambda x_t, sigma: x_t.flatten(2).transpose(1, 2),
        encode_images=_encode,
        unprompted=denoiser("unprompted"),
    )


def copied(batch: RewardBatch) -> RewardBatch:
    """Return a batch that shares no data with the given one."""
    columns = {name: list(values) for name, values in batch.columns.items()}
    return replace(batch, latents=batch.latents.clone(), prompts=list(batch.prompts), columns=columns)


def resized(batch: RewardBatch, size: tuple[int, int]) -> RewardBatch:
    """Return a batch of latents of another size `(height, width)`, and of the states that they were predicted from."""

    def resize(latents: Tensor) -> Tensor:
        return F.interpolate(latents, size=size, mode="bilinear", align_corners=False)

    context = batch.context
    if context is not None and context.origin is not None:
        context = replace(context, origin=replace(context.origin, states=resize(context.origin.states)))
    return replace(batch, latents=resize(batch.latents), context=context)


def _encode(images: Tensor) -> Tensor:
    pooled = F.avg_pool2d(images, 8)
    return torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)


def _decode(latents: Tensor) -> Tensor:
    return latents[:, :3].sigmoid()
