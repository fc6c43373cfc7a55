"""Rewards that are awaited, for some samples only, with gradients, in chunks, beside one that asks the models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardOutput
from rdm_sdk.rewards.evaluate import evaluate_rewards

WEIGHTS = torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4)


def score(batch: RewardBatch) -> Tensor:
    """A score whose gradient is other for every pixel and sample."""
    return (WEIGHTS * batch.images.square()).sum((1, 2, 3))


class Plain(Reward):
    """Differentiated by the host; for samples with a text."""

    capabilities = Capabilities(gradient="autograd", columns=("text",))

    def score(self, batch: RewardBatch) -> Tensor:
        return score(batch)


class Awaited(Reward):
    """The same, computed elsewhere; later chunks answer first."""

    capabilities = Capabilities(gradient="awaited", asynchronous=True, columns=("text",))

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    async def score_async(self, batch: RewardBatch) -> Tensor:
        self.sizes.append(len(batch))
        await asyncio.sleep(0.01 / len(self.sizes))
        return score(batch)

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        scores = await self.score_async(batch)
        return RewardOutput(scores, 2 * WEIGHTS * batch.images)


class Asks(Reward):
    """One that asks the run's models, so that awaited ones are asked before it computes."""

    capabilities = Capabilities(context=True)

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.zeros(len(batch))


def batch_of(texts: list[str | None]) -> RewardBatch:
    """Samples whose decoder is no identity, so that a gradient must go back through it."""
    latents = torch.rand(len(texts), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return RewardBatch(
        latents=latents, prompts=["a"] * len(texts), group_size=1, decode=lambda x: x.square(), columns={"text": texts}
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 4, None])
@pytest.mark.parametrize("asked_early", [False, True])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(
    "texts",
    [["x"] * 6, ["x", None, None, "y", "z", None], [None, None, None, None, "x", "y"], [None] * 5 + ["x"]],
    ids=["all", "some", "last two", "last"],
)
def test_awaited_is_what_computing_here_gives(
    texts: list[Any], graded: bool, asked_early: bool, chunk_size: int | None
) -> None:
    """Scores and gradients, whichever samples a reward is for and however the batch is cut."""
    rewards: dict[str, Reward] = {"plain": Plain(), "awaited": Awaited()} | ({"asks": Asks()} if asked_early else {})
    wanted = ["plain", "awaited"] if graded else []
    result = evaluate_rewards(rewards, batch_of(texts), chunk_size=chunk_size, gradients_of=wanted)
    plain, awaited = result.outputs["plain"], result.outputs["awaited"]
    torch.testing.assert_close(awaited.scores, plain.scores, equal_nan=True)
    assert awaited.scores.isnan().tolist() == [text is None for text in texts]
    assert result.shown["awaited"] == result.shown["plain"] == sum(text is not None for text in texts)
    if graded:
        assert plain.gradient is not None
        assert plain.gradient.abs().sum() > 0
        torch.testing.assert_close(awaited.gradient, plain.gradient)
    else:
        assert plain.gradient is awaited.gradient is None
