"""Gaussian transitions of few-step samplers: the policy that a student is.

A transition leads from `x_t` at noise level sigma, where the student predicts `x_0`, to the next level sigma_next.
Every rule but "ode" is random wherever sigma_next > 0, and so has a density; the last step of a grid (sigma_next = 0)
never has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_sdk.method.noise import FlowSchedule, NoiseSchedule, from_x_0, per_sample

Reduction = Literal["sum", "mean"]
TransitionKind = Literal["renoise", "sde", "cps", "ode"]


@dataclass(frozen=True)
class Transition:
    """A Gaussian over the next state."""

    mean: Tensor
    """`[N, *x]`."""
    std: Tensor
    """`[N]`; zero where the step is deterministic (the last one)."""


TransitionRule = Callable[[NoiseSchedule, Tensor, Tensor, Tensor, Tensor, float], Transition]
"""`(schedule, x_t [N, *x], x_0 [N, *x], sigma [N], sigma_next [N], eta) -> Transition`."""


def renoising_transition(
    schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float = 1.0
) -> Transition:
    """Return N(alpha(sigma_next) x_0, sigma_next^2 I): predict the data, then noise it again to the next level.

    This is consistency (multistep LCM) sampling, and what `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`
    and `LCMScheduler` do. It forgets `x_t`, `sigma` and `eta`.
    """
    return Transition(schedule.alpha(per_sample(sigma_next, x_0)) * x_0, sigma_next)


def cps_transition(
    schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> Transition:
    """Return coefficient-preserving sampling's step (CPS, arXiv 2509.05952) for `eta` in [0, 1].

    Part of the predicted noise eps is kept and the rest drawn afresh, so that the next state has exactly the signal and
    noise levels of sigma_next: std = sigma_next sin(eta pi / 2), mean = alpha' x_0 + sqrt(sigma_next^2 - std^2) eps.
    `eta=1` is the re-noising step, `eta=0` the deterministic one.
    """
    # Sine and cosine instead of a square root of a difference, which would round to less than zero at eta = 1.
    fresh, kept = math.sin(eta * math.pi / 2), math.cos(eta * math.pi / 2)
    eps = from_x_0(schedule, "eps", x_0, x_t, sigma)
    level = per_sample(sigma_next, x_0)
    return Transition(schedule.alpha(level) * x_0 + level * kept * eps, sigma_next * fresh)


def ode_transition(
    schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float = 0.0
) -> Transition:
    """Return the deterministic step alpha(sigma_next) x_0 + sigma_next eps: DDIM, and Euler on a rectified flow."""
    return cps_transition(schedule, x_t, x_0, sigma, sigma_next, 0.0)


def sde_transition(
    schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> Transition:
    """Return Flow-GRPO's Euler-Maruyama step of the flow's reverse SDE (arXiv 2505.05470), for `eta` > 0.

    With dt = sigma - sigma_next and the SDE's noise rate s = eta sqrt(sigma / (1 - sigma)): mean = x_t - (v +
    s^2 eps / (2 sigma)) dt, std = s sqrt(dt). At sigma = 1 the rate is infinite; there, as in Flow-GRPO, 1 - sigma is
    replaced by 1 - sigma_next. The last step is the deterministic one. Its levels are those of sigma_next only for
    small dt, which a four-step grid does not have; `cps_transition` keeps them at any dt.

    Raises:
        ValueError: the schedule is not a rectified flow, for which the SDE is derived.
    """
    if not isinstance(schedule, FlowSchedule):
        raise ValueError("the 'sde' transition is derived for rectified flows; use 'cps' or 'renoise' for this model")
    eps = from_x_0(schedule, "eps", x_0, x_t, sigma)
    dt = sigma - sigma_next
    clean = torch.where(sigma < 1, 1 - sigma, 1 - sigma_next)
    rate = (eta * (sigma / clean).sqrt()).masked_fill(sigma_next == 0, 0.0)
    drift = (eps - x_0) + per_sample(rate.square() / (2 * sigma), x_0) * eps
    return Transition(x_t - drift * per_sample(dt, x_0), rate * dt.sqrt())


TRANSITIONS: dict[TransitionKind, TransitionRule] = {
    "renoise": renoising_transition,
    "sde": sde_transition,
    "cps": cps_transition,
    "ode": ode_transition,
}


def step(transition: Transition, eps: Tensor) -> Tensor:
    """Return the sample `mean + std eps` `[N, *x]`."""
    return transition.mean + per_sample(transition.std, eps) * eps


def log_density(transition: Transition, x_next: Tensor) -> Tensor:
    """Return the log-density of every coordinate of `x_next`, float32 `[N, *x]`; their sum is the joint one.

    The transition must be random, std > 0, which is not looked at: to ask the device would be to wait for it.
    """
    std = per_sample(transition.std.float(), x_next)
    residual = (x_next.float() - transition.mean.float()) / std
    return -0.5 * residual.square() - std.log() - 0.5 * math.log(2 * math.pi)
