"""From reward outputs to the student's loss: group statistics, weights and the two routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_sdk.core.groups import Normalization, ScoreScale, group_advantage, scale_field
from rdm_sdk.types import RewardOutput


@dataclass(frozen=True)
class Signal:
    """What all rewards together tell the student; a part is None where no reward takes that route."""

    field: Tensor | None
    """The direction in which each x_0 should move, `[N, *x]`."""
    advantage: Tensor | None
    """How much better than its group each trajectory was, `[N]`."""
    magnitudes: dict[str, Tensor]
    """Mean |weighted field| per differentiable reward, a scalar each: who pulls how hard."""


def combine(
    outputs: Mapping[str, RewardOutput],
    weights: Mapping[str, float],
    group_size: int,
    normalization: Normalization,
    scale_rewards: ScoreScale,
) -> Signal:
    """Combine rewards by fixed weights (GNDM, arXiv 2603.28460, our reading).

    A reward with a gradient adds `weight * gradient / group statistic` to the field; the statistic is taken over the
    reward's own magnitudes (for distribution matching DMD2's mean |x_0 - D_real|, otherwise mean |gradient|), at the
    latents. A reward without adds `weight * group advantage`.
    """
    field: Tensor | None = None
    advantage: Tensor | None = None
    magnitudes: dict[str, Tensor] = {}
    for name, output in outputs.items():
        weight = weights[name]
        if weight == 0:
            continue
        if output.gradient is not None:
            own = output.gradient.abs().flatten(1).mean(1)
            magnitude = own if output.magnitude is None else output.magnitude
            magnitude = magnitude.masked_fill(output.scores.isnan(), torch.nan)  # not applicable: in no statistic
            part = weight * scale_field(output.gradient, magnitude, group_size, normalization)
            magnitudes[name] = part.abs().mean()
            field = part if field is None else field + part
        else:
            scored = weight * group_advantage(output.scores, group_size, scale_rewards)
            advantage = scored if advantage is None else advantage + scored
    return Signal(field, advantage, magnitudes)


def zero_std_share(scores: Tensor, group_size: int) -> Tensor:
    """Return the share of groups whose scores `[N]` are all equal or NaN: they teach nothing through advantages."""
    groups = scores.reshape(-1, group_size)
    missing = groups.isnan()
    highest, lowest = groups.masked_fill(missing, -torch.inf).amax(1), groups.masked_fill(missing, torch.inf).amin(1)
    return (highest <= lowest).float().mean()
