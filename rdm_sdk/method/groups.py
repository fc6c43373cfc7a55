"""Group statistics: scores are centered, gradient fields are only scaled.

Samples are group-major: the `group_size` samples of one prompt are adjacent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rdm_sdk.method.noise import per_sample

Normalization = Literal["group", "sample"]
ScoreScale = Literal["group", "batch", "none"]
EPS = 1e-4
"""What is added to a standard deviation before it divides scores, as in TRL."""


def alone(sums: Tensor) -> Tensor:
    """Return the total over all processes of a run that has one."""
    return sums


def _grouped(values: Tensor, group_size: int) -> Tensor:
    if values.ndim != 1:
        raise ValueError(
            f"expected one value per sample, shape [N], got {list(values.shape)}; "
            "a gradient field must never be centered: that erases the drift its samples share"
        )
    return in_groups(values, group_size)


def in_groups(samples: Tensor, group_size: int, least: int = 1) -> Tensor:
    """Return samples `[N, *x]`, group-major, as `[P, G, *x]`.

    Raises:
        ValueError: N is not a multiple of `group_size`, or that is below `least`.
    """
    if group_size < least or len(samples) % group_size:
        raise ValueError(f"{len(samples)} samples do not divide into groups of {group_size} ({least} or more)")
    return samples.reshape(-1, group_size, *samples.shape[1:])


def constant_groups(scores: Tensor, group_size: int) -> Tensor:
    """Return of each group whether its scores (of `[N]`) are all equal or NaN, so that none has an advantage; `[P]`."""
    groups = in_groups(scores, group_size)
    missing = groups.isnan()
    return groups.masked_fill(missing, -torch.inf).amax(1) <= groups.masked_fill(missing, torch.inf).amin(1)


def group_advantage(
    scores: Tensor,
    group_size: int,
    scale: ScoreScale = "group",
    eps: float = EPS,
    total: Callable[[Tensor], Tensor] = alone,
) -> Tensor:
    """Turn scores `[N]` into advantages `[N]`: minus the group mean, over a standard deviation.

    A_i = (r_i - mean_group) / (std + eps), with `scale` naming whose standard deviation: the group's (GRPO, arXiv
    2402.03300), that of all scores (arXiv 2508.08221), or none. NaN scores are left out of the statistics and get
    advantage 0, as does every sample of a constant group. TRL's `GRPOTrainer` computes the same.

    Args:
        scores: float `[N]`, group-major.
        group_size: samples per group.
        scale: whose standard deviation.
        eps: added to it.
        total: adds a tensor up over the processes of a run; "batch" is over all of them.

    Raises:
        ValueError: `scores` is not `[N]`, or N is not a multiple of `group_size`.
    """
    # Double precision: scores may be large against their spread (those of distribution matching sum over dimensions).
    grouped = _grouped(scores.double(), group_size)
    valid = ~grouped.isnan()
    count = valid.sum(1, keepdim=True).clamp_min(1)
    mean = grouped.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    # A constant group can leave a rounding residue of the mean's size behind; that is no advantage.
    counts = valid & ~constant_groups(scores, group_size)[:, None]
    centered = (grouped - mean).masked_fill(~counts, 0.0)
    if scale == "group":
        deviation = (centered.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    elif scale == "batch":
        _, deviation = moments(scores, total)
    else:
        return centered.float().flatten()
    return (centered / (deviation + eps)).float().flatten()


def moments(values: Tensor, total: Callable[[Tensor], Tensor] = alone) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (unbiased) of the values that are not NaN, float64 scalars; 0 of none.

    `total` adds a tensor up over the processes of a run, each of which has values of its share.
    """
    valid = ~values.isnan()
    present = values.double().masked_fill(~valid, 0.0)
    count, summed = total(torch.stack([valid.sum().double(), present.sum()]))
    mean = summed / count.clamp_min(1)
    squares = total((present - mean).masked_fill(~valid, 0.0).square().sum())
    return mean, (squares / (count - 1).clamp_min(1)).sqrt()


def group_deviation(samples: Tensor, group_size: int) -> Tensor:
    """Return how far samples `[N, *x]` of a group lie from each other: a value's standard deviation in its group.

    Averaged over values and groups, in the samples' units; a scalar. 0 where all samples of every group are alike.

    Raises:
        ValueError: N is not a multiple of `group_size`, or a group has one sample.
    """
    return in_groups(samples.float(), group_size, least=2).std(1).mean()


def group_scale(
    magnitudes: Tensor,
    group_size: int,
    normalization: Literal["group", "sample", "batch"] = "group",
    total: Callable[[Tensor], Tensor] = alone,
) -> Tensor:
    """Return the divisor of each sample's gradient field, `[N]`, from per-sample magnitudes `[N]`.

    "group" averages the magnitudes inside the group, so that relative magnitudes survive (GNDM); "sample" is DMD2;
    "batch", which tilts have, averages over everything. NaN magnitudes are left out; where nothing is left, the divisor
    is 0. With `group_size=1`, "group" is "sample". A field is never centered. `total` adds a tensor up over the
    processes of a run: "batch" is over all of them.

    Raises:
        ValueError: `magnitudes` is not `[N]`, or N is not a multiple of `group_size`.
    """
    grouped = _grouped(magnitudes, group_size)
    valid = ~grouped.isnan()
    present = grouped.masked_fill(~valid, 0.0)
    if normalization == "sample":
        divisor = present
    elif normalization == "group":
        divisor = (present.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)).expand_as(grouped)
    else:
        summed, count = total(torch.stack([present.sum(), valid.sum().to(present.dtype)]))
        divisor = (summed / count.clamp_min(1)).expand_as(grouped)
    return divisor.flatten()


def scale_field(field: Tensor, magnitudes: Tensor, group_size: int, normalization: Normalization) -> Tensor:
    """Divide a gradient field `[N, *x]` by its `group_scale`; a vanishing scale is floored at float32's epsilon."""
    divisor = group_scale(magnitudes, group_size, normalization)
    return field / per_sample(divisor.clamp_min(torch.finfo(torch.float32).eps), field)
