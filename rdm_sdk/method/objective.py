"""From reward outputs to the student's loss: group statistics, weights, and the losses of the two kinds of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_sdk.method.groups import EPS, Normalization, ScoreScale, alone, group_advantage, moments, scale_field
from rdm_sdk.method.importance import clip_fraction
from rdm_sdk.method.losses import clipped_surrogate
from rdm_sdk.types import RewardOutput, read_all

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


# ---- Fields ---------------------------------------------------------------------------------------------------------


def normalize(outputs: Mapping[str, RewardOutput], group_size: int, normalization: Normalization) -> dict[str, Tensor]:
    """Return the field `[N, *x]` of every reward with a gradient, in comparable units.

    It is the direction in which the reward wants each x_0 to move (GNDM, arXiv 2603.28460, our reading): its gradient,
    divided by a statistic of the reward's magnitudes at the latents (for distribution matching and tilts DMD2's mean
    |x_0 - D_real|, otherwise mean |gradient|). A sample's |gradient| by itself is never that statistic: it would blow
    up what a satisfied reward has left to teach, so "sample" means "group" for rewards without magnitudes. A reward
    that applies to none of the samples has no field.
    """
    fields = {}
    graded = [(name, output, output.gradient) for name, output in outputs.items() if output.gradient is not None]
    absent = read_all([output.scores.isnan().all() for _, output, _ in graded])
    for (name, output, gradient), missing in zip(graded, absent, strict=True):
        if missing:
            continue
        magnitude, statistic = output.magnitude, normalization
        if magnitude is None:
            magnitude, statistic = gradient.abs().flatten(1).mean(1), "group"
        magnitude = magnitude.masked_fill(output.scores.isnan(), torch.nan)  # not applicable: in no statistic
        fields[name] = scale_field(gradient, magnitude, group_size, statistic)
    return fields


def combine(fields: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | None:
    """Return g = sum_k lambda_k g_k `[N, *x]`, or None if no field has a weight."""
    total: Tensor | None = None
    for name, field in fields.items():
        weight = weights[name]
        if weight != 0:
            part = field if weight == 1 else weight * field
            total = part if total is None else total + part
    return total


# ---- Scores ---------------------------------------------------------------------------------------------------------


def aggregate(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_size: int,
    scale: ScoreScale,
    aggregation: Aggregation,
    total: Callable[[Tensor], Tensor] = alone,
) -> Tensor | None:
    """Return the advantages `[N]` of several rewards' scores `[N]`, or None if none of them has a weight.

    With L = sum_k |lambda_k|, they are L times what TRL's `GRPOTrainer` makes of scores with weights lambda_k / L:

    - "sum_then_normalize": the group advantages of the weighted sum of scores, in their native units; `scale` names
      the deviation that divides them.
    - "normalize_then_sum" (GDPO, arXiv 2601.05242): the weighted sum of each reward's group advantages, minus the mean
      of all such sums and over their deviation; `scale` plays no part.

    TRL has no other loss beside it, so it leaves the size of the weights out. The factor L puts it back: a reward
    alone has lambda times the advantages that it has at weight 1, and weights compare with those of fields.

    Args:
        scores: name to scores `[N]`, group-major; NaN where a reward does not apply.
        weights: name to lambda.
        group_size: samples per group.
        scale: whose standard deviation.
        aggregation: the order.
        total: adds a tensor up over the processes of a run; statistics of the batch are over all of them.
    """
    counting = {name: weights[name] for name in scores if weights[name]}
    if not counting:
        return None
    size = sum(abs(weight) for weight in counting.values())
    if aggregation == "sum_then_normalize":
        parts = {name: scores[name].double() for name in counting}
    else:
        parts = {
            name: group_advantage(scores[name], group_size).double().masked_fill(scores[name].isnan(), torch.nan)
            for name in counting
        }
    stacked = torch.stack([counting[name] / size * part for name, part in parts.items()])
    summed = stacked.nansum(0).masked_fill(stacked.isnan().all(0), torch.nan)
    if aggregation == "sum_then_normalize":
        return size * group_advantage(summed, group_size, scale, total=total)
    mean, deviation = moments(summed, total)
    return size * ((summed - mean) / (deviation + EPS)).masked_fill(summed.isnan(), 0.0).float()


@dataclass(frozen=True)
class PolicyLoss:
    """The surrogate of rewards that act by their scores."""

    loss: Tensor
    """Scalar."""
    clipped: Tensor
    """Share of ratios outside the clip range, a scalar."""


def policy_loss(
    log_ratios: Tensor, advantage: Tensor, weights: Tensor, epsilon: float, dimensions: int, count: int
) -> PolicyLoss:
    """Return the clipped surrogate of `n` random transitions in a batch of `count` samples.

    Args:
        log_ratios: of the transitions, `[n]`, differentiable.
        advantage, weights: of their trajectories, `[n]`; the weights are those of the states they left.
        epsilon: the clip range.
        dimensions: by how many dimensions the log-ratios were summed (1 if they were averaged). The loss is divided by
            it, because the pathwise loss is an average over dimensions and weights must compare between the routes.
        count: N.
    """
    ratio = log_ratios.exp()
    losses = weights * clipped_surrogate(ratio, advantage, epsilon)
    return PolicyLoss(losses.sum() / (count * dimensions), clip_fraction(ratio, epsilon))


def policy_pull(log_ratios: Tensor, x_0: Tensor, advantages: Mapping[str, Tensor]) -> dict[str, float]:
    """Return per reward the mean |A_i d log pi_i / d x_0,i| over the transitions it applies to: its pull, as a field's.

    Args:
        log_ratios: summed over dimensions, `[n]`, differentiable in `x_0`.
        x_0: the predictions that they come from, `[n, *x]`.
        advantages: name to `[n]`, NaN where the reward does not apply. One that applies to none is left out.
    """
    if not len(x_0):
        return dict.fromkeys(advantages, 0.0)
    (slope,) = torch.autograd.grad(log_ratios.sum(), x_0, retain_graph=True)
    sizes = slope.abs().flatten(1).mean(1)
    given = advantages.values()
    values = read_all([(a.abs() * sizes).nanmean() for a in given] + [a.isnan().all() for a in given])
    found = zip(advantages, values[: len(advantages)], values[len(advantages) :], strict=True)
    return {name: pull for name, pull, absent in found if not absent}
