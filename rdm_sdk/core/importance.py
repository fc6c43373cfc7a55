"""Importance ratios between the student that made a rollout and the student being updated."""

from __future__ import annotations

from torch import Tensor


def importance_ratio(log_probability: Tensor, old_log_probability: Tensor) -> Tensor:
    """Return pi_new / pi_old `[N]`, differentiable in `log_probability`; the old one is detached."""
    return (log_probability - old_log_probability.detach()).exp()


def effective_sample_size(ratio: Tensor) -> Tensor:
    """Return Kish's effective sample size (sum w)^2 / sum w^2 of ratios `[N]`, a scalar in [1, N]."""
    weights = ratio.detach().double()
    return weights.sum().square() / weights.square().sum()


def clip_fraction(ratio: Tensor, epsilon: float) -> Tensor:
    """Return the share of ratios `[N]` outside [1 - epsilon, 1 + epsilon]."""
    return ((ratio.detach() - 1).abs() > epsilon).float().mean()
