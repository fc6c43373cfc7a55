"""What travels between the parts: frozen dataclasses with a shape for each field.

`P` prompts, `G` samples per prompt, `N = P G` samples in group-major order, `K` student steps, `x` a sample's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(x_t [N, *x], sigma [N]) -> x_0 [N, *x]`, its condition closed over."""

Condition: TypeAlias = dict[str, Tensor]
"""What a prompt encodes to: named tensors whose first dimension is the batch."""


def select(condition: Condition, rows: Tensor) -> Condition:
    """Return the given rows (int64 `[n]`) of a condition."""
    return {name: tensor[rows] for name, tensor in condition.items()}


@dataclass(frozen=True)
class Rollout:
    """Where each sample's trajectory was stopped, and what the student predicted there."""

    states: Tensor
    """x_k `[N, *x]`, the state at the stop step."""
    steps: Tensor
    """k, int64 `[N]`, each in [0, K)."""
    x_0: Tensor
    """The student's x_0 at the stop step `[N, *x]`."""
    next_states: Tensor | None
    """x_{k+1} `[N, *x]`, drawn from the stop step's transition; only if the rollout was finished."""
    final: Tensor | None
    """The endpoints `[N, *x]` after all K steps; only if the rollout was finished."""


@dataclass(frozen=True)
class RewardOutput:
    """What every reward returns, distribution matching and a stranger's callable alike."""

    scores: Tensor
    """float32 `[N]`, native units, higher is better, NaN = not applicable to this sample."""
    gradient: Tensor | None = None
    """d reward / d latents `[N, *x]`, None for a reward without a gradient."""
    magnitude: Tensor | None = None
    """`[N]`, what the gradient is measured against in group statistics; None means its own mean |g|."""


@dataclass(frozen=True)
class Experience:
    """One micro-batch of student samples on its way through a training step."""

    prompts: list[str]
    """`N` prompts, group-major."""
    columns: Mapping[str, list[object]]
    """The dataset's other columns, `N` entries each."""
    condition: Condition
    rollout: Rollout
