"""Noise schedules, re-noising and the conversions between a network's prediction and x_0.

`sigma` is the noise level, 0 = data and 1 = pure noise; `x_t = alpha(sigma) x_0 + sigma eps`. Two schedules cover the
field: `FlowSchedule` (rectified flow, alpha = 1 - sigma) and `VariancePreservingSchedule` (alpha^2 + sigma^2 = 1, every
DDPM-like model once its discrete steps are expressed by their sigma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Prediction = Literal["x_0", "eps", "v", "flow"]
"""What a network predicts: the data, the noise, DDPM's v = alpha eps - sigma x_0, or the flow eps - x_0."""


class NoiseSchedule(Protocol):
    """How much signal is left at a noise level, and when in training a level comes.

    *Time* runs from 0, data, to 1 and is what training draws evenly: the noise level itself for a rectified flow, the
    share of the training timesteps passed for a DDPM.
    """

    def alpha(self, sigma: Tensor) -> Tensor:
        """Return the signal level at `sigma`, same shape."""
        ...

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times of noise levels, same shape."""
        return sigma

    def levels(self, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return noise levels `[N]` spread over times from `low` to `high` (`[N]`) as `uniform` is over [0, 1)."""
        return low + (high - low) * uniform

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Return |d lambda / d time| at `sigma` for the log signal-to-noise ratio lambda = log(alpha^2 / sigma^2)."""
        ...

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return the weight that turns a squared x_0 error into the squared error of the native prediction."""
        ...


LOWEST_FLOW_TIME = 1e-3
"""The first of the thousand timesteps of rectified flows: at 0 itself nothing is left to predict."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow: alpha = 1 - sigma; the native prediction is the flow eps - x_0 = (x_t - x_0) / sigma."""

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def levels(self, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return super().levels(uniform, low.clamp_min(LOWEST_FLOW_TIME), high)

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        return 2 / (sigma * (1 - sigma))

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return sigma.pow(-2)


@dataclass(frozen=True)
class VariancePreservingSchedule(NoiseSchedule):
    """DDPM: alpha = sqrt(1 - sigma^2); the native loss is the noise error, (alpha / sigma)^2 times the x_0 error.

    Without training timesteps, which `SteppedSchedule` of a base has, its time is sigma.
    """

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.square()).clamp_min(0).sqrt()

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        return 2 / (sigma * (1 - sigma.square()))

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.square()) / sigma.square()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` `[N]` to `[N, 1, ...]` so that it broadcasts over `like` `[N, *x]`.

    Raises:
        ValueError: `values` is not one value per sample.
    """
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"expected one value per sample, shape [{like.shape[0]}], got {list(values.shape)}; "
            "expand a single noise level to the batch first"
        )
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(schedule: NoiseSchedule, x_0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = alpha(sigma) x_0 + sigma eps; `x_0`, `eps` `[N, *x]`, `sigma` `[N]`."""
    s = per_sample(sigma, x_0)
    return schedule.alpha(s) * x_0 + s * eps


def to_x_0(schedule: NoiseSchedule, kind: Prediction, prediction: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Convert a prediction `[N, *x]` made at `x_t` and `sigma` `[N]` to x_0.

    Conversions cancel large terms, so pass float32 tensors. "eps" has no x_0 where alpha = 0 (pure noise).
    """
    s = per_sample(sigma, x_t)
    a = schedule.alpha(s)
    if kind == "x_0":
        return prediction
    if kind == "eps":
        return (x_t - s * prediction) / a
    if kind == "v":
        return (a * x_t - s * prediction) / (a.square() + s.square())
    return (x_t - s * prediction) / (a + s)


def from_x_0(schedule: NoiseSchedule, kind: Prediction, x_0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of `to_x_0`; needs sigma > 0 for every kind but "x_0"."""
    s = per_sample(sigma, x_t)
    a = schedule.alpha(s)
    if kind == "x_0":
        return x_0
    eps = (x_t - a * x_0) / s
    if kind == "eps":
        return eps
    if kind == "v":
        return a * eps - s * x_0
    return eps - x_0


def score(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return grad log p(x_t) = (alpha D(x_t) - x_t) / sigma^2 for a denoiser output `x_0` = D(x_t), `[N, *x]`."""
    s = per_sample(sigma, x_t)
    return (schedule.alpha(s) * x_0 - x_t) / s.square()
