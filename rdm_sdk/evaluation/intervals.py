"""How sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from rdm_sdk.errors import DataError

CONFIDENCE = 0.95
AT_ONCE = 100_000
"""Values that are drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """A figure with a confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Tensor | Sequence[float],
    groups: Sequence[int] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the mean of values `[N]` with a percentile bootstrap interval (Efron 1979, Annals of Statistics 7).

    NaN values (a reward that does not apply) are left out. The values are drawn again with replacement, `draws` times,
    always in the same way for the same seed: within their groups, if there are any, and with deviations from the
    group's mean that are larger by (n / (n - 1))^(1/2), without which small groups would vary too little (Rao and Wu
    1988, Journal of the American Statistical Association 83).

    Args:
        values: the values.
        groups: the group of each, such as the number of its prompt, where the prompts are given and the images are
            drawn; None where all values are drawn from one distribution.
        draws: how often they are drawn again.
        seed: of the draws.
        confidence: of the interval.

    Raises:
        DataError: no value is left.
    """
    every = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    labels = torch.zeros(len(every), dtype=torch.long) if groups is None else torch.as_tensor(groups)
    kept, labels = every[~every.isnan()], labels[~every.isnan()]
    if not len(kept):
        raise DataError("a mean needs at least one value that is not NaN")
    kept, first, sizes = sorted_groups(kept, labels)
    means = group_means(kept, first, sizes)
    spread = (kept - means) * (sizes / (sizes - 1).clamp_min(1)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in [AT_ONCE // len(kept) + 1] * (draws // (AT_ONCE // len(kept) + 1) + 1):
        chosen = first + (torch.rand(count, len(kept), generator=generator, dtype=torch.float64) * sizes).long()
        found.append((means + spread[chosen]).mean(1))
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.cat(found)[:draws].quantile(bounds).tolist()
    return Interval(float(kept.mean()), low, high)


def normal_interval(value: float, deviation: float, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a figure that is normally distributed with a standard deviation."""
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    return Interval(value, value - reach, value + reach)


def mean_variance(values: Tensor, groups: Sequence[int] | None = None) -> float:
    """Return the variance of the mean of values `[N]` that are drawn within their groups, or from one distribution."""
    labels = torch.zeros(len(values), dtype=torch.long) if groups is None else torch.as_tensor(groups)
    ordered, first, sizes = sorted_groups(values, labels)
    squares = (ordered - group_means(ordered, first, sizes)).square() * sizes / (sizes - 1).clamp_min(1)
    return float(squares.sum()) / len(values) ** 2


def sorted_groups(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values `[N]` sorted by group, and for each the row of its group's first value and its group's size, `[N]`.

    Groups of one value, whose spread nobody can know, are put together as one.
    """
    _, numbers, counts = labels.unique(return_inverse=True, return_counts=True)
    numbers = torch.where(counts[numbers] > 1, numbers, len(counts))
    order = numbers.argsort(stable=True)
    _, places, sizes = numbers[order].unique_consecutive(return_inverse=True, return_counts=True)
    firsts = sizes.cumsum(0) - sizes
    return values[order], firsts[places], sizes[places]


def group_means(values: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean of each value's group, `[N]`, for what `sorted_groups` returned."""
    sums = torch.zeros_like(values).index_add_(0, first, values)
    return sums[first] / sizes
