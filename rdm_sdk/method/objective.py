"""From reward outputs to the student's loss: group statistics, weights and the two routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_sdk.method.groups import Normalization, ScoreScale, group_advantage, scale_field
from rdm_sdk.method.importance import clip_fraction
from rdm_sdk.method.losses import clipped_surrogate
from rdm_sdk.method.noise import per_sample
from rdm_sdk.types import RewardOutput

Aggregation = Literal["normalize_then_sum", "sum_then_normalize"]


@dataclass(frozen=True)
class Term:
    """What one reward says, in units that compare with the others' and before any weight; one of the two is None."""

    field: Tensor | None = None
    """The direction in which it wants each x_0 to move, `[N, *x]`, divided by its group statistic."""
    advantage: Tensor | None = None
    """How much better than its group each trajectory was, `[N]`."""
    missing: Tensor | None = None
    """Which trajectories have no score, bool `[N]`; their advantage is 0. None is none of them."""


@dataclass(frozen=True)
class Signal:
    """What all rewards together tell the student; a part is None where no reward takes that route."""

    field: Tensor | None
    """The direction in which each x_0 should move, `[N, *x]`."""
    advantage: Tensor | None
    """How much better than its group each trajectory was, `[N]`."""


def normalize(
    outputs: Mapping[str, RewardOutput],
    group_size: int,
    normalization: Normalization,
    scale_rewards: ScoreScale,
    aggregation: Aggregation = "normalize_then_sum",
) -> dict[str, Term]:
    """Put every reward in comparable units (GNDM, arXiv 2603.28460, our reading).

    A gradient is divided by a statistic of the reward's own magnitudes (for distribution matching and tilts DMD2's mean
    |x_0 - D_real|, otherwise mean |gradient|), at the latents. A sample's own |gradient| is never that statistic: it
    would blow up what a satisfied reward has left to say, so "sample" means "group" for rewards without magnitudes.
    Scores become group advantages; for "sum_then_normalize" they are only centered here, and scaled after their sum.
    """
    terms = {}
    for name, output in outputs.items():
        if output.gradient is not None:
            magnitude, statistic = output.magnitude, normalization
            if magnitude is None:
                magnitude = output.gradient.abs().flatten(1).mean(1)
                statistic = "group" if normalization == "sample" else normalization
            magnitude = magnitude.masked_fill(output.scores.isnan(), torch.nan)  # not applicable: in no statistic
            terms[name] = Term(field=scale_field(output.gradient, magnitude, group_size, statistic))
        else:
            scale = scale_rewards if aggregation == "normalize_then_sum" else "none"
            advantage = group_advantage(output.scores, group_size, scale)
            terms[name] = Term(advantage=advantage, missing=output.scores.isnan())
    return terms


def combine(terms: Mapping[str, Term], weights: Mapping[str, float], group_size: int, scale: ScoreScale) -> Signal:
    """Add the terms up by their weights: g = sum_k lambda_k g_k and A = sum_k lambda_k A_k.

    The sum of several advantages is normalized again, by `scale`, and given the size of the weights' sum, so that
    rewards that contradict each other do not fade and the weights still compare with those of gradients.
    """
    field: Tensor | None = None
    advantages, missing = [], []
    total = 0.0
    for name, term in terms.items():
        weight = weights[name]
        if weight == 0:
            continue
        if term.field is not None:
            part = term.field if weight == 1 else weight * term.field
            field = part if field is None else field + part
        elif term.advantage is not None:
            advantages.append(weight * term.advantage)
            missing.append(
                term.missing if term.missing is not None else torch.zeros_like(term.advantage, dtype=torch.bool)
            )
            total += abs(weight)
    if not advantages:
        return Signal(field, None)
    advantage = torch.stack(advantages).sum(0)
    if scale == "none":
        return Signal(field, advantage)
    advantage = advantage.masked_fill(torch.stack(missing).all(0), torch.nan)  # in no statistic
    return Signal(field, total * group_advantage(advantage, group_size, scale))


@dataclass(frozen=True)
class PolicyLoss:
    """The surrogate of the scored route."""

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
    """Return per scored reward the mean |A_i d log pi_i / d x_0,i| over the transitions: its pull, as a field's.

    Args:
        log_ratios: summed over dimensions, `[n]`, differentiable in `x_0`.
        x_0: the predictions that they come from, `[n, *x]`.
        advantages: name to `[n]`.
    """
    if not len(x_0):
        return dict.fromkeys(advantages, 0.0)
    (slope,) = torch.autograd.grad(log_ratios.sum(), x_0, retain_graph=True)
    return {name: float((per_sample(a, slope) * slope).abs().mean()) for name, a in advantages.items()}


def zero_std_share(scores: Tensor, group_size: int) -> Tensor:
    """Return the share of groups whose scores `[N]` are all equal or NaN: they teach nothing through advantages."""
    groups = scores.reshape(-1, group_size)
    missing = groups.isnan()
    highest, lowest = groups.masked_fill(missing, -torch.inf).amax(1), groups.masked_fill(missing, torch.inf).amin(1)
    return (highest <= lowest).float().mean()
