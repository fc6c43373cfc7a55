"""Plain functions as rewards: `f(images=, prompts=, **columns) -> list[float | None]`, as in TRL.

One that has an argument called `step` or `log` is given `RewardBatch.step` or `RewardBatch.log`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rdm_sdk.errors import RewardError, nearest
from rdm_sdk.rewards.base import RESERVED_COLUMNS, Capabilities, Reward, RewardBatch

DECLARABLE = ("gradient", "scope", "prompts", "columns", "reads", "range", "dtype", "stochastic", "parameters")
"""What a function may declare of `Capabilities`; the rest takes a class."""
HOSTS = ("step", "log")
"""What a function is given of the batch if its signature names it, and never in place of a column."""
_DECLARED = "__rdm_declares__"
_Function = TypeVar("_Function", bound=Callable[..., object])


def declares(**capabilities: Any) -> Callable[[_Function], _Function]:
    """Return a decorator by which a plain function declares what it can do and needs, as a class does.

    `@declares(gradient="autograd")` is for a function that returns a tensor that is differentiable in the images,
    `scope="group"` for one that compares the samples of a prompt (it may take `group_size`). `columns` are needed
    beside those that are parameters without a default, `reads` may be there beside those that are parameters with one.
    The decorated function is the function itself.

    Raises:
        RewardError: a word that is not in `Capabilities`, or a capability that a function cannot have.
    """
    for name in capabilities:
        if name not in DECLARABLE:
            raise RewardError(
                f"declares({name}=...) cannot be used; a function declares {', '.join(DECLARABLE)}."
                f"{nearest(name, DECLARABLE)} A subclass of Reward declares anything"
            )
    if capabilities.get("gradient", "none") not in ("none", "autograd"):
        raise RewardError(
            f"declares(gradient={capabilities['gradient']!r}) cannot be used; a function is scored ('none') or "
            "differentiable ('autograd'); a subclass of Reward writes its gradient itself"
        )
    Capabilities(**capabilities)  # a wrong value is an error where it is written

    def declared(function: _Function) -> _Function:
        setattr(function, _DECLARED, dict(capabilities))
        return function

    return declared


class CallableReward(Reward):
    """A plain function as a reward; None marks a sample to which it does not apply.

    Unless it declares more (`declares`), it is scored, never differentiated, so it acts on the student as
    group-normalized advantages.
    """

    capabilities = Capabilities()

    def __init__(self, function: Callable[..., object], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        super().__init__()
        taken = _parameters(function)
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken)
        self._taken = {p.name for p in taken}
        declared: dict[str, Any] = dict(getattr(function, _DECLARED, {}))
        given = (*RESERVED_COLUMNS, *HOSTS, *(["group_size"] if declared.get("scope") == "group" else []))
        columns = [p for p in taken if p.name not in given and p.kind in _NAMED]
        if "prompt" in (p.name for p in columns):
            raise RewardError(
                f"reward function {self.name!r} has an argument 'prompt', for which nothing is given; the prompts of "
                "all images are 'prompts'"
            )
        needed = dict.fromkeys([*(p.name for p in columns if p.default is p.empty), *declared.get("columns", ())])
        read = dict.fromkeys([*(p.name for p in columns), *declared.get("reads", ())])
        declared |= {"columns": tuple(needed), "reads": tuple(name for name in read if name not in needed)}
        self.capabilities = replace(self.capabilities, **declared)

    def call(self, batch: RewardBatch) -> object:
        """Call the function with the images, the prompts and the columns that it takes."""
        given: dict[str, object] = {"images": batch.images, "prompts": batch.prompts, **batch.columns}
        if self.capabilities.scope == "group":
            given["group_size"] = batch.group_size
        given = {name: value for name, value in given.items() if self._takes_all or name in self._taken}
        return self.function(**given | {name: getattr(batch, name) for name in HOSTS if name in self._taken})

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        for name in HOSTS:
            if name in self._taken and name in columns:
                raise RewardError(
                    f"reward function {self.name!r} has an argument {name!r}, which is the run's ({_MEANING[name]}), "
                    f"and the data has a column of that name; rename the column, or the argument"
                )
        return super().applies(prompts, columns)

    def score(self, batch: RewardBatch) -> Tensor:
        return self.read(self.call(batch))

    def defined_in(self) -> str:
        return str(getattr(self.function, "__module__", type(self.function).__module__))

    def read(self, values: object) -> Tensor:
        """Turn what the function returned into scores `[N]`."""
        if isinstance(values, Tensor):
            return values.float() if self.capabilities.gradient == "autograd" else values.detach().float()
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
        returned = self.call(batch)
        return self.read(await returned if inspect.isawaitable(returned) else returned)


_MEANING = {"step": "the optimizer step, None outside of training", "log": "log(name, values) logs a figure"}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    """Return a function's parameters; one whose signature cannot be read is taken to accept everything."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("anything", inspect.Parameter.VAR_KEYWORD)]


def as_reward(function: Callable[..., object], name: str | None = None) -> CallableReward:
    """Return a function, a coroutine function or an object with such a `__call__` as a reward."""
    call = getattr(function, "__call__", None)  # noqa: B004 - an object's async __call__ is looked at, not for it
    awaited = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    return (AsyncCallableReward if awaited else CallableReward)(function, name)
