"""Stable Diffusion 1.x and 2.x: a UNet on discrete DDPM steps that predicts the noise or v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor, nn

from rdm_sdk.core.noise import Prediction, VariancePreservingSchedule
from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.models.base import ModelAdapter, Network
from rdm_sdk.types import Condition

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
"""What diffusers calls predictions, and what we call them."""


class SDAdapter(ModelAdapter):
    """`StableDiffusionPipeline`: variance-preserving, 1,000 discrete steps, one CLIP text encoder.

    A noise level between two steps is passed to the UNet as a fractional timestep, which its sinusoidal embedding
    takes; on the steps themselves it is the integer that the pipeline passes.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: None; CLIP's number of tokens is fixed.

    Raises:
        ConfigError: `max_sequence_length` was given.
        ModelError: its scheduler has no training steps to follow, or another kind of prediction.
    """

    component = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    schedule = VariancePreservingSchedule()

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline)
        if max_sequence_length is not None:
            raise ConfigError(
                f"max_sequence_length={max_sequence_length} is for T5 and language models; {type(pipeline).__name__} "
                "has CLIP alone, whose number of tokens is fixed: leave it at None"
            )
        scheduler = pipeline.scheduler
        kind = scheduler.config.get("prediction_type")
        if not hasattr(scheduler, "alphas_cumprod") or kind not in PREDICTIONS:
            raise ModelError(
                f"{type(pipeline).__name__} needs a scheduler of a DDPM (alphas_cumprod and prediction_type "
                f"{', '.join(PREDICTIONS)}); got {type(scheduler).__name__} with prediction_type={kind!r}. Load the "
                "pipeline with its own scheduler; the student gets one of its own."
            )
        self.prediction = PREDICTIONS[kind]
        self.train_sigmas: Tensor = (1 - scheduler.alphas_cumprod.double()).sqrt().float()
        """Noise level of every training step, rising, `[T]`."""

    def encode_prompts(self, prompts: list[str]) -> Condition:
        device = self.pipeline.text_encoder.device
        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        size = self.backbone.config.sample_size
        default_height, default_width = (size, size) if isinstance(size, int) else size
        height, width = height or default_height * factor, width or default_width * factor
        # Below the deepest level, the UNet's skip connections no longer meet what it samples up.
        unit = factor * 2 ** (len(self.backbone.config.down_block_types) - 1)
        if height % unit or width % unit:
            raise ConfigError(f"height and width must be multiples of {unit}; got {height} x {width}")
        return (self.backbone.config.in_channels, height // factor, width // factor)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Return the UNet's timesteps `[N]` for noise levels `[N]`: linear between training steps, held at the ends."""
        known = self.train_sigmas.to(sigma.device)
        sigma = sigma.float().clamp(known[0], known[-1])
        above = torch.searchsorted(known, sigma).clamp_min(1)
        low, high = known[above - 1], known[above]
        return above - 1 + (sigma - low) / (high - low)

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.backbone.dtype
        return network(
            role,
            sample=x_t.to(dtype),
            timestep=self.timesteps(sigma),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
        )

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        images: Tensor = vae.decode(self._unscaled(latents).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        return self._scaled(latents.float())

    def _scaled(self, latents: Tensor) -> Tensor:
        """Return the VAE's latents as the UNet knows them."""
        factor: float = self.pipeline.vae.config.scaling_factor
        return latents * factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        factor: float = self.pipeline.vae.config.scaling_factor
        return latents / factor

    def feature_block(self) -> nn.Module:
        block: nn.Module = self.backbone.mid_block
        return block

    @property
    def feature_width(self) -> int:
        return int(self.backbone.config.block_out_channels[-1])

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

    def inference_call(self, num_steps: int) -> str:
        return f"num_inference_steps={num_steps}, guidance_scale=1.0"

    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        type(self.pipeline).save_lora_weights(directory, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
