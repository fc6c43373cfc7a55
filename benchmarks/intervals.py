"""What many seeds say: means with 95 % intervals, and ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half_width:.2g}" if self.count > 1 else f"{self.mean:.4g}"

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval; one value alone has an unknown, so infinite, one."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], float("inf"), count)
    half_width = student_t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
    return Estimate(statistics.mean(values), float(half_width), count)


def interval(values: Sequence[float], decimals: int = 2) -> str:
    """Return a mean with its 95 % interval, as text; one value has none."""
    found = estimate(values)
    mean = f"{found.mean:.{decimals}f}"
    return f"{mean} [{found.low:.{decimals}f}, {found.high:.{decimals}f}]" if found.count > 1 else mean


def ratio(logs: Sequence[float]) -> str:
    """Return the geometric mean of ratios, from their logarithms, with its 95 % interval; one value has none."""
    found = estimate(logs)
    mean = f"{math.exp(found.mean):.3f}"
    return f"{mean} [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]" if found.count > 1 else mean
