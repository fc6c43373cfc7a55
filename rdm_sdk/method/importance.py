"""Importance ratios between the student that made a rollout and the student being updated."""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk.method.transitions import Reduction, Transition, log_density


def log_ratio(new: Transition, old: Transition, x_next: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return log(pi_new / pi_old) `[N]` of `x_next` `[N, *x]`, differentiable in `new`; `old` is detached.

    The two densities are subtracted coordinate by coordinate, before their large common terms are summed, so that equal
    transitions give exactly 0 at any dimension. `reduction="sum"` is the true joint ratio; `"mean"` averages over the
    coordinates instead: a trust-region surrogate, whose exponential is no importance weight.
    Both must be random (std > 0), as `log_density` says.
    """
    difference = (log_density(new, x_next) - log_density(old, x_next).detach()).flatten(1)
    return difference.sum(1) if reduction == "sum" else difference.mean(1)


def truncated_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """Return importance weights `[N]`, min(ratio, cap), from log-ratios `[N]`; detached.

    Truncation (Ionides, "Truncated importance sampling", 2008) trades a little bias for bounded variance. At a
    log-ratio of 0 the weight is exactly 1.
    """
    return log_ratio.detach().exp().clamp_max(cap)


def weight_sums(ratio: Tensor) -> Tensor:
    """Return the sums of weights, of their squares and of samples, `[3]`, for ratios `[N]`; several processes add them.

    In float64, because squares of ratios differ by many orders of magnitude.
    """
    weights = ratio.detach().double()
    return torch.stack([weights.sum(), weights.square().sum(), weights.new_tensor(len(weights))])


def effective_share(sums: Tensor) -> Tensor:
    """Return the effective share of samples, a scalar in (0, 1], from their `weight_sums`.

    It is Kish's effective sample size (sum w)^2 / sum w^2 over N; 0 where all weights are.
    """
    total, squares, count = sums
    return torch.where(squares > 0, total.square() / (squares * count), 0.0)


def clip_fraction(ratio: Tensor, epsilon: float) -> Tensor:
    """Return the share of ratios `[N]` outside [1 - epsilon, 1 + epsilon]."""
    return ((ratio.detach() - 1).abs() > epsilon).float().mean()
