"""Stable Diffusion XL: two text encoders, and the picture's size as a condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rdm_sdk.models.base import Network
from rdm_sdk.models.sd import SDAdapter
from rdm_sdk.types import Condition


class SDXLAdapter(SDAdapter):
    """`StableDiffusionXLPipeline`: as Stable Diffusion, and told the size that the picture is made for, uncropped.

    An empty prompt is encoded as the pipeline encodes a missing negative prompt: by zeros, if the base was trained so
    (`force_zeros_for_empty_prompt`). Latents are normalized per channel where the VAE says how.
    """

    def encode_prompts(self, prompts: list[str]) -> Condition:
        device = self.pipeline.text_encoder_2.device
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=device)
            embeds = embeds.masked_fill(empty[:, None, None], 0.0)
            pooled = pooled.masked_fill(empty[:, None], 0.0)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype, factor = self.backbone.dtype, self.pipeline.vae_scale_factor
        size = (x_t.shape[-2] * factor, x_t.shape[-1] * factor)
        sizes = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=dtype)  # original, crop's corner, target
        return network(
            role,
            sample=x_t.to(dtype),
            timestep=self.timesteps(sigma),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            added_cond_kwargs={
                "text_embeds": condition["text_embeds"].to(dtype),
                "time_ids": sizes.expand(len(x_t), -1),
            },
        )

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super()._scaled((latents - mean) / std)

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super()._unscaled(latents) * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's channels, `[1, C, 1, 1]`; 0 and 1 where it has none."""
        config: Any = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return torch.zeros_like(like[:1, :, :1, :1]), torch.ones_like(like[:1, :, :1, :1])
        return like.new_tensor(mean).reshape(1, -1, 1, 1), like.new_tensor(std).reshape(1, -1, 1, 1)
