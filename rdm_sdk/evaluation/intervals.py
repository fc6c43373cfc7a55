"""How sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from rdm_sdk.errors import DataError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with a confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Tensor | Sequence[float], *, draws: int = 1000, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval:
    """Return the mean of values `[N]` with a percentile bootstrap interval (Efron 1979, Annals of Statistics 7).

    NaN values (a reward that does not apply) are left out. The N values are drawn again with replacement, `draws`
    times, always in the same way for the same seed.

    Raises:
        DataError: no value is left.
    """
    kept = torch.as_tensor(values, dtype=torch.float64).flatten()
    kept = kept[~kept.isnan()]
    if not len(kept):
        raise DataError("a mean needs at least one value that is not NaN")
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, dtype=torch.float64)
    for row in range(draws):  # one at a time: N may be large
        means[row] = kept[torch.randint(len(kept), (len(kept),), generator=generator)].mean()
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = means.quantile(bounds).tolist()
    return Interval(float(kept.mean()), low, high)


def normal_interval(value: float, deviation: float, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a figure that is normally distributed with a standard deviation."""
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    return Interval(value, value - reach, value + reach)
