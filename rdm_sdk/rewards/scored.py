"""The other route: a reward with a gradient, used as if it had none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch


class Scored(Reward):
    """A reward whose gradient is left aside: it acts on the student through group-normalized advantages of its scores.

    `RDMTrainer(..., ["dm", Scored(Legibility())], ...)` compares the two routes; `reward_route="advantage"` does it to
    every external reward of a run.
    """

    capabilities = Capabilities()

    def __init__(self, reward: Reward) -> None:
        if not isinstance(reward, Reward):
            raise RewardError(f"Scored wraps a Reward object; got {reward!r}")
        self.wrapped, self.config = reward, reward.config
        self.name, self.origin, self.preprocessing = reward.name, reward.origin, reward.preprocessing
        declared = reward.capabilities
        self.capabilities = replace(declared, gradient="none", context=declared.needs_models)

    def score(self, batch: RewardBatch) -> Tensor:
        return self.wrapped.score(batch)

    def make_head(self, feature_width: int, num_steps: int) -> nn.Module:
        return self.wrapped.make_head(feature_width, num_steps)

    def training_loss(self, batch: RewardBatch) -> Tensor:
        return self.wrapped.training_loss(batch)

    def to(self, device: torch.device | str) -> None:
        self.wrapped.to(device)

    def example(self) -> RewardBatch | None:
        return self.wrapped.example()

    def defined_in(self) -> str:
        return self.wrapped.defined_in()
