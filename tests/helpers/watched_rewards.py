"""Rewards that take down what they are asked, for tests of rollouts that are used more than once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rdm_sdk import RewardBatch, RewardOutput
from rdm_sdk.rewards.dm import DistributionMatching

BOLD: dict[str, Any] = {"learning_rate": 5e-3, "critic_learning_rate": 1e-3, "critic_steps": 1}
"""Settings of a student that soon leaves its rollouts behind."""


class Judge:
    """A scored reward that takes down which prompts it was asked about."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, images: Tensor, prompts: list[str], **columns: object) -> Tensor:
        self.asked.append(list(prompts))
        return images.mean(dim=(1, 2, 3))


class WatchedMatching(DistributionMatching):
    """Distribution matching that takes down the importance weights it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[Tensor] = []
        self.trained: list[Tensor] = []

    def field(self, batch: RewardBatch) -> RewardOutput:
        assert batch.weights is not None
        self.judged.append(batch.weights)
        return super().field(batch)

    def training_loss(self, batch: RewardBatch) -> Tensor:
        assert batch.weights is not None
        self.trained.append(batch.weights)
        return super().training_loss(batch)
