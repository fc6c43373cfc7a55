"""From signals to scalars with the right gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def pathwise_loss(x_0: Tensor, field: Tensor) -> Tensor:
    """Return a scalar whose gradient with respect to `x_0` `[N, *x]` is `-field / x_0.numel()`.

    It has the value and the gradient of DMD's pseudo-target loss 1/2 mse(x_0, stop_gradient(x_0 + field)) (arXiv
    2311.18828) without the rounding of x_0 + field - x_0. Minimizing it moves `x_0` along `field`.
    """
    field = field.detach()
    injected = -(field * x_0).mean()
    return injected - injected.detach() + 0.5 * field.square().mean()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """Return the loss per sample `[N]`: minus the pessimistic min(r A, clip(r, 1 - epsilon, 1 + epsilon) A).

    PPO's objective (arXiv 1707.06347, eq. 7); `ratio` and `advantage` are `[N]`.
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantage, clipped * advantage)
