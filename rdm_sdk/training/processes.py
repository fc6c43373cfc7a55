"""What the processes of a run do together; by default there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """A run's processes, each of which calls every method at the same point of the step."""

    count: int = 1
    reduce: Callable[[Tensor, Literal["sum", "mean"]], Tensor] = lambda tensor, how: tensor
    """`(tensor, how)` to the sum or mean of all processes' tensors, on each of them."""
    gather: Callable[[object], list[Any]] = lambda value: [value]
    """A value to the list of all processes' values, on each of them."""
    index: int = 0
    """Which process this is, from 0; a micro-batch of all processes holds their samples in this order."""
    note: Callable[[str], str] = lambda doing: ""
    """Takes down what this process begins to do, for the others if they wait for it; returns what it did before."""

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        return self.reduce(sums, "sum")

    def anywhere(self, names: Iterable[str]) -> list[str]:
        """Return the names that any process gives, sorted, so that all of them go through them in the same order."""
        return sorted({name for given in self.gather(sorted(names)) for name in given})

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes.

        The roles take turns in one step, which distributed data parallel's own hooks cannot follow; they stay idle,
        because no forward goes through its wrapper.
        """
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.reduce(parameter.grad, "mean")
