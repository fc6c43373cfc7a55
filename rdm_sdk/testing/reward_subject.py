"""The reward under test, and how its scores are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.judging import as_declared
from rdm_sdk.testing.batches import copied
from rdm_sdk.testing.kit import require
from rdm_sdk.types import RewardOutput

TOLERANCE = 1e-4
"""Relative to the scores' own size; models add up differently in batches of different sizes."""


@dataclass(frozen=True)
class Subject:
    """A reward and a batch to try it on; every use gets a copy of the batch and the same random state."""

    reward: Reward
    batch: RewardBatch

    @property
    def chunk(self) -> int:
        """The smallest chunk that the reward may be given."""
        return self.batch.group_size if self.reward.capabilities.scope == "group" else 1

    def raw_scores(self, batch: RewardBatch) -> Any:
        """Return what `score` returns, unchecked."""
        if self.reward.capabilities.asynchronous:
            return evaluate_reward(self.reward, batch, gradients_of=()).scores
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = as_declared(self.reward, batch, batch.latents.device)
            if self.reward.capabilities.needs_models:
                given = replace(given, context=batch.context)
            return self.reward.score(given)

    def judge(
        self,
        batch: RewardBatch | None = None,
        differentiate: bool = False,
        chunk_size: int | None = None,
        device: str | None = None,
    ) -> RewardOutput:
        """Return what the host makes of the reward."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batch = copied(self.batch) if batch is None else batch
            wanted = None if differentiate else ()
            return evaluate_reward(self.reward, batch, gradients_of=wanted, chunk_size=chunk_size, device=device)

    def gradient(self, chunk_size: int | None = None) -> Tensor:
        """Return the gradient that the host makes of the reward; that there is one, it has checked."""
        return cast("Tensor", self.judge(differentiate=True, chunk_size=chunk_size).gradient)


def assert_close(found: Tensor, wanted: Tensor, what: str, advice: str, tolerance: float = TOLERANCE) -> None:
    require(torch.equal(found.isnan(), wanted.isnan()), f"{what} are NaN for other samples; {advice}")
    found, wanted = found[~found.isnan()], wanted[~wanted.isnan()]
    size = max(float(wanted.abs().max()), 1e-6)
    difference = float((found - wanted).abs().max())
    require(difference <= tolerance * size, f"{what} differ by up to {difference:.3g} (of {size:.3g}); {advice}")


def same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def shown(scores: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in scores.flatten()[:8].tolist())
