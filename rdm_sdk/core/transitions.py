"""Gaussian transitions of a few-step sampler: the policy that a student is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rdm_sdk.core.noise import NoiseSchedule, per_sample

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Transition:
    """A Gaussian over the next state."""

    mean: Tensor
    """`[N, *x]`."""
    std: Tensor
    """`[N]`; zero where the step is deterministic (the last one)."""


def renoising_transition(schedule: NoiseSchedule, x_0: Tensor, sigma_next: Tensor) -> Transition:
    """Return N(alpha(sigma_next) x_0, sigma_next^2 I): predict the data, then noise it again to the next level.

    This is consistency (multistep LCM) sampling, and what `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`
    and `LCMScheduler` do. `x_0` `[N, *x]`, `sigma_next` `[N]`.
    """
    return Transition(schedule.alpha(per_sample(sigma_next, x_0)) * x_0, sigma_next)


def step(transition: Transition, eps: Tensor) -> Tensor:
    """Return the sample `mean + std eps` `[N, *x]`."""
    return transition.mean + per_sample(transition.std, eps) * eps


def log_probability(transition: Transition, x_next: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return the log-density `[N]` (float32) of `x_next` `[N, *x]`.

    `reduction="sum"` is the true joint log-density; `"mean"` divides it by the number of dimensions, which makes
    ratios of it a trust-region surrogate and no importance weights.

    Raises:
        ValueError: a transition is deterministic (std = 0) and so has no density. The last step of a few-step
            sampler is one; train it pathwise.
    """
    if not bool((transition.std > 0).all()):
        raise ValueError(
            "a transition with std = 0 has no density, so it has no log-probability and no ratio; the last sampling "
            "step (sigma_next = 0) is such a one: leave it out here and train it pathwise"
        )
    std = per_sample(transition.std.float(), x_next)
    residual = (x_next.float() - transition.mean.float()) / std
    log_density = -0.5 * residual.square() - std.log() - 0.5 * math.log(2 * math.pi)
    flat = log_density.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)
