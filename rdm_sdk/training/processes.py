"""What the processes of a run do together; by default there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


def _alone(tensor: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    return tensor


def _only(value: object) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Processes:
    """A run's processes, each of which calls every method at the same point of the step."""

    count: int = 1
    reduce: Callable[[Tensor, Literal["sum", "mean"]], Tensor] = _alone
    """`(tensor, how)` to the sum or mean of all processes' tensors, on each of them."""
    gather: Callable[[object], list[Any]] = _only
    """A value to the list of all processes' values, on each of them."""

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes.

        The roles take turns in one step, which distributed data parallel's own hooks cannot follow; they stay idle,
        because no forward goes through its wrapper.
        """
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.reduce(parameter.grad, "mean")
