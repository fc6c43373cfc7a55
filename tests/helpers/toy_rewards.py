"""Rewards of one line, and a batch of latents that they can read."""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig


class Brightness(Reward):
    """Mean brightness, differentiable."""

    capabilities = Capabilities(gradient="autograd")

    class Config(RewardConfig):
        power: float = 1.0

    def score(self, batch: RewardBatch) -> Tensor:
        return (batch.images**self.config.power).mean(dim=(1, 2, 3))


def count_ink(images, prompts, **columns):
    """Scored, not differentiated."""
    return (1 - images.mean(dim=(1, 2, 3))).tolist()


def latent_batch(decoded: list[int] | None = None, count: int = 6) -> RewardBatch:
    """Six samples in groups of two; `decoded` collects the sizes of the batches that are decoded."""
    latents = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def decode(z: Tensor) -> Tensor:
        if decoded is not None:
            decoded.append(len(z))
        return z.sigmoid().repeat_interleave(2, dim=-1)

    return RewardBatch(
        latents=latents,
        prompts=[f"p{i // 2}" for i in range(count)],
        group_size=2,
        decode=decode,
        columns={"row": list(range(count))},
    )
