"""What a server answers: scores, gradients, what it serves; written by the server, read and checked by the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rdm_sdk.errors import shown
from rdm_sdk.rewards.base import Capabilities, all_finite
from rdm_sdk.serving.tensors import BodyError, pack, unpack
from rdm_sdk.types import RewardOutput

TOLD = ("gradient", "scope", "prompts", "columns", "range", "stochastic")
"""What a client is told of a reward's capabilities; all else is the server's affair."""


def pack_answer(outputs: Mapping[str, RewardOutput], gradient_dtype: str = "F32") -> bytes:
    """Return the body of an answer: per reward `scores/NAME`, float32 `[N]`, and maybe `gradient/NAME`.

    What a reward logged is `logged/NAME/FIGURE`, float32 `[N]`; which samples it was for is `applies/NAME`, `[N]`,
    1 and 0 in uint8.

    As "F16", each sample's gradient is divided by its largest entry, which is `scale/NAME`, float32 `[N]`: gradients of
    single pixels would vanish in float16 otherwise.
    """
    tensors: dict[str, Tensor] = {}
    for label, output in outputs.items():
        tensors[f"scores/{label}"] = output.scores.float()
        tensors |= {f"logged/{label}/{name}": values.float() for name, values in output.logged.items()}
        if output.applies is not None:
            tensors[f"applies/{label}"] = output.applies.to(torch.uint8)
        if output.gradient is None:
            continue
        gradient = output.gradient.float()
        if gradient_dtype == "F16":
            largest = gradient.flatten(1).abs().amax(1)
            tensors[f"scale/{label}"] = largest
            divisor = torch.where(largest > 0, largest, torch.ones_like(largest))
            gradient = (gradient / divisor.reshape(-1, 1, 1, 1)).half()
        tensors[f"gradient/{label}"] = gradient
    return pack({}, tensors)


def read_answer(body: bytes | bytearray, label: str, images: Sequence[int], gradient: bool) -> RewardOutput:
    """Return what a server said of images of a shape `[N, 3, H, W]`.

    Raises:
        BodyError: the answer is something else, or of another shape, or infinite, or its gradient is NaN.
    """
    _, tensors = unpack(body)
    scores = _taken(tensors, f"scores/{label}", images[:1])
    if bool(scores.isinf().any()):
        raise BodyError(f"{shown(f'scores/{label}', 80)} holds an infinite number")
    prefix = f"logged/{label}/"
    logged = {name[len(prefix) :]: _taken(tensors, name, images[:1]) for name in tensors if name.startswith(prefix)}
    applies = _read_applies(tensors, label, images[0])
    if not gradient:
        return RewardOutput(scores, logged=logged, applies=applies)
    values = _taken(tensors, f"gradient/{label}", images)
    if f"scale/{label}" in tensors:
        values = values * _taken(tensors, f"scale/{label}", images[:1]).reshape(-1, 1, 1, 1)
    if not all_finite(values):
        raise BodyError(f"the gradient of {label!r} is not finite")
    return RewardOutput(scores, values, logged=logged, applies=applies)


def _taken(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or not tensor.is_floating_point() or list(tensor.shape) != list(shape):
        got = "none" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
        raise BodyError(f"{shown(name, 80)} must be floats of shape {list(shape)}; got {got}")
    return tensor.float()


def _read_applies(tensors: Mapping[str, Tensor], label: str, count: int) -> Tensor | None:
    """Return which of `count` samples the reward was for, bool `[N]`; None where an older server does not say."""
    told = tensors.get(f"applies/{label}")
    if told is None:
        return None
    if told.dtype != torch.uint8 or list(told.shape) != [count] or bool((told > 1).any()):
        raise BodyError(
            f"{shown(f'applies/{label}', 80)} must be 1 or 0 of each sample, U8 of shape [{count}]; got "
            f"{list(told.shape)} {told.dtype}"
        )
    return told.bool()


def described_capabilities(capabilities: Capabilities) -> dict[str, Any]:
    """Return a reward's capabilities as JSON; infinite bounds become null."""
    told = {name: getattr(capabilities, name) for name in TOLD}
    told["columns"] = list(capabilities.columns)
    if capabilities.range is not None:
        told["range"] = [bound if abs(bound) != float("inf") else None for bound in capabilities.range]
    return told


def are_names(told: object) -> TypeGuard[list[str]]:
    """Return whether what a server says is a list of texts."""
    return isinstance(told, list) and all(isinstance(name, str) for name in told)


def read_capabilities(told: object, reads: object) -> Capabilities:
    """Return the capabilities of a reward that is asked over the wire, from what its server says of it.

    Args:
        told: what `described_capabilities` returns.
        reads: columns that the reward reads if they are there; beside the others, because older servers know of none.

    Raises:
        BodyError: they are something else.
    """
    if not isinstance(told, dict) or told.keys() != set(TOLD):
        raise BodyError(f"capabilities must be an object with {', '.join(TOLD)}; got {shown(told, 120)}")
    columns, bounds = told["columns"], told["range"]
    right = (
        told["gradient"] in ("none", "autograd", "awaited")
        and told["scope"] in ("sample", "group")
        and all(isinstance(told[name], bool) for name in ("prompts", "stochastic"))
        and are_names(columns)
    )
    if not right:
        raise BodyError(f"these are no capabilities: {shown(told, 200)}")
    if not are_names(reads):
        raise BodyError(f"reads must be a list of names of columns; got {shown(reads, 120)}")
    return Capabilities(
        gradient="none" if told["gradient"] == "none" else "awaited",
        scope=told["scope"],
        prompts=told["prompts"],
        columns=tuple(columns),
        reads=tuple(reads),
        range=_bounds(bounds),
        stochastic=told["stochastic"],
        asynchronous=True,
        parameters=0,
    )


def _bounds(bounds: object) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not (
        isinstance(bounds, list) and len(bounds) == 2 and all(b is None or type(b) in (int, float) for b in bounds)
    ):
        raise BodyError(f"a range is two numbers; got {shown(bounds, 80)}")
    low, high = (float(b) if b is not None else end for b, end in zip(bounds, (-torch.inf, torch.inf), strict=True))
    if not low < high:
        raise BodyError(f"a range is [low, high]; got {shown(bounds, 80)}")
    return low, high
