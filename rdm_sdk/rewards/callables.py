"""Plain functions as rewards: `f(images=, prompts=, **columns) -> list[float | None]`, as in TRL."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch


class CallableReward(Reward):
    """A plain function as a reward; None marks a sample to which it does not apply.

    It is scored, never differentiated, so it acts on the student as group-normalized advantages.
    """

    capabilities = Capabilities()

    def __init__(self, function: Callable[..., object], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        super().__init__()

    def score(self, batch: RewardBatch) -> Tensor:
        return self.read(self.function(images=batch.images, prompts=batch.prompts, **batch.columns))

    def read(self, values: object) -> Tensor:
        """Turn what the function returned into scores `[N]`."""
        if isinstance(values, Tensor):
            return values.detach().float()
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"reward function {self.name!r} must return a list of numbers (or None) or a tensor, one entry per "
                f"image; got {type(values).__name__}"
            )
        try:
            return torch.tensor([float("nan") if value is None else float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward function {self.name!r} must return numbers (or None), one per image; got {values[:3]!r}"
            ) from error


class AsyncCallableReward(CallableReward):
    """A coroutine function as a reward: awaited together with the other asynchronous ones."""

    capabilities = Capabilities(asynchronous=True)

    async def score_async(self, batch: RewardBatch) -> Tensor:
        returned = self.function(images=batch.images, prompts=batch.prompts, **batch.columns)
        return self.read(await returned if inspect.isawaitable(returned) else returned)


def as_reward(function: Callable[..., object], name: str | None = None) -> CallableReward:
    """Return a function, a coroutine function or an object with such a `__call__` as a reward."""
    call = getattr(function, "__call__", None)  # noqa: B004 - an object's async __call__ is looked at, not for it
    awaited = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    return (AsyncCallableReward if awaited else CallableReward)(function, name)
