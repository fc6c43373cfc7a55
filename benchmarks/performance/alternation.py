"""Two kinds of work timed in turns, in one process, so that whatever slows the machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

WARM_UP = 2
"""Turns that are not counted: memory is taken, kernels are chosen."""


def now() -> float:
    """Return seconds: of this process's processors, which others do not take; on a GPU of the clock, all work done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Alternate(TrainerCallback):
    """Times each cycle of a trainer (one optimizer step), and one turn of other work after it."""

    def __init__(self, other: Callable[[], None]) -> None:
        self.other = other
        self.cycles: list[float] = []
        self.others: list[float] = []
        self.begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.other()
        self.begin = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        middle = now()
        self.cycles.append(middle - self.begin)
        self.other()
        self.others.append(now() - middle)
        self.begin = now()

    def totals(self) -> tuple[float, float]:
        """Return the mean seconds of a cycle and of the other work."""
        return statistics.mean(self.cycles[WARM_UP:]), statistics.mean(self.others[WARM_UP:])

    def result(self) -> tuple[float, float, float]:
        """Return the median seconds of a cycle and of the other work, and the median of their ratios, pair by pair."""
        pairs = list(zip(self.cycles, self.others, strict=True))[WARM_UP:]
        cycle, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        return cycle, other, statistics.median(one / two for one, two in pairs)
