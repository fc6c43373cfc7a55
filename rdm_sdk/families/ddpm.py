"""What DDPM families share: a thousand discrete steps, a network that predicts the noise or v, and their schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.method.noise import Prediction, VariancePreservingSchedule

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
"""What diffusers calls predictions, and what we call them."""


@dataclass(frozen=True, eq=False)
class SteppedSchedule(VariancePreservingSchedule):
    """The variance-preserving schedule on a base's training timesteps: its very signal levels, and its time.

    Near pure noise, a sigma in float32 no longer tells alpha: at PixArt's last step, 0.99998 and 0.0064, it is off by a
    thousandth, and so is the x_0 of a predicted noise.
    """

    sigmas: Tensor
    """Noise level of every training timestep, rising, `[T]`."""
    alphas: Tensor
    """Signal level of every training timestep, `[T]`."""
    prediction: Prediction = "eps"
    """What the base was trained to predict: its loss is the critic's."""

    def alpha(self, sigma: Tensor) -> Tensor:
        at = self._timestep(sigma)
        known = self.sigmas.to(sigma.device)[at] == sigma
        return torch.where(known, self.alphas.to(sigma)[at], super().alpha(sigma))

    def time(self, sigma: Tensor) -> Tensor:
        return self._timestep(sigma) / len(self.sigmas)

    def levels(self, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the levels of training timesteps, each equally likely, the first and the last of the range included.

        From .02 to .98 of a thousand, these are 20 to 980, as DMD2 draws them (arXiv 2405.14867); from 0 to 1, all.
        """
        count = len(self.sigmas)
        # Rounded, because no single-precision share is a timestep exactly: .02 is 19.9999996 thousandths.
        first, last = ((t.double() * count).round().long().clamp_max(count - 1) for t in (low, high))
        chosen = first + (uniform.double() * (last - first + 1)).long()
        return self.sigmas.to(uniform.device)[torch.minimum(chosen, last)]

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        kept = self.alphas.double().square()
        (rate,) = torch.gradient(torch.log(kept / (1 - kept)))
        return rate.abs().to(sigma)[self._timestep(sigma)] * len(self.sigmas)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        if self.prediction == "eps":
            return super().loss_weight(sigma)
        return torch.ones_like(sigma) if self.prediction == "x_0" else sigma.pow(-2)

    def _timestep(self, sigma: Tensor) -> Tensor:
        """Return the training timestep at or next above a noise level, int64, same shape."""
        known = self.sigmas.to(sigma.device)
        return torch.searchsorted(known, sigma.float().contiguous()).clamp_max(len(known) - 1)


class DDPMFamily(ModelFamily):
    """A network on discrete steps, variance-preserving.

    A noise level between two steps is passed to the network as a fractional timestep, which its sinusoidal embedding
    takes; on the steps themselves it is the integer that the pipeline passes.

    Raises:
        ModelError: its scheduler has no training steps to follow, or another kind of prediction.
    """

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        scheduler = pipeline.scheduler
        kind = scheduler.config.get("prediction_type")
        if not hasattr(scheduler, "alphas_cumprod") or kind not in PREDICTIONS:
            raise ModelError(
                f"{type(pipeline).__name__} needs a scheduler of a DDPM (alphas_cumprod and prediction_type "
                f"{', '.join(PREDICTIONS)}); got {type(scheduler).__name__} with prediction_type={kind!r}. Load the "
                "pipeline with its own scheduler; the student gets one that suits it."
            )
        self.prediction = PREDICTIONS[kind]
        kept = scheduler.alphas_cumprod.double()
        self.train_sigmas: Tensor = (1 - kept).sqrt().float()
        """Noise level of every training step, rising, `[T]`."""
        self.schedule = SteppedSchedule(self.train_sigmas, kept.sqrt().float(), self.prediction)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Return the UNet's timesteps `[N]` for noise levels `[N]`: linear between training steps, held at the ends."""
        known = self.train_sigmas.to(sigma.device)
        sigma = sigma.float().clamp(known[0], known[-1])
        above = torch.searchsorted(known, sigma).clamp_min(1)
        low, high = known[above - 1], known[above]
        return above - 1 + (sigma - low) / (high - low)

    def student_scheduler(self, num_steps: int, shift: float | None, stochastic: bool = True) -> Any:
        steps = self.pipeline.scheduler.config.num_train_timesteps
        if shift is not None:
            raise ConfigError(f"shift={shift} is for rectified flows; {self.base_name!r} has none: leave it at None")
        if steps % num_steps:
            raise ConfigError(
                f"num_inference_steps={num_steps} does not divide the {steps} training steps of {self.base_name!r}, so "
                "its samplers would disagree on the grid; use 1, 2, 4, 5, 8, 10, ..."
            )
        # Both end their grids, from the last training step on, at the same steps: with as many "original" steps as
        # steps, LCM's grid is DDIM's "trailing" one.
        if stochastic:
            return LCMScheduler.from_config(self._steps(), original_inference_steps=num_steps, clip_sample=False)
        return DDIMScheduler.from_config(self._steps(), timestep_spacing="trailing", clip_sample=False)

    def _steps(self) -> dict[str, Any]:
        """Return the settings of the base's scheduler that say what its steps are."""
        config = self.pipeline.scheduler.config
        names = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
        return {name: config[name] for name in [*names, "rescale_betas_zero_snr"] if name in config}

    def student_sigmas(self, num_steps: int, shift: float | None) -> list[float]:
        scheduler = self.student_scheduler(num_steps, shift)
        scheduler.set_timesteps(num_steps)
        return [float(self.train_sigmas[step]) for step in scheduler.timesteps.tolist()]
