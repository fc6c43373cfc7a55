"""Stable Diffusion XL: two text encoders, and the picture's size as a condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rdm_sdk.families.sd import SDFamily
from rdm_sdk.types import Condition


class SDXLFamily(SDFamily):
    """`StableDiffusionXLPipeline`: as Stable Diffusion, and told the size that the picture is made for, uncropped.

    No prompt is zeros, as the pipeline takes a missing negative prompt, if the base was trained so
    (`force_zeros_for_empty_prompt`). Latents are normalized per channel where the VAE says how.
    """

    required = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def example_encoding(self, count: int) -> Condition:
        first, second = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        width = first.config.hidden_size + second.config.hidden_size
        embeds = torch.zeros(count, first.config.max_position_embeddings, width, dtype=first.dtype, device=self.device)
        pooled = embeds.new_zeros(count, second.config.projection_dim)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def encode_no_prompt(self) -> Condition:
        blank = self.encode_prompts([""])
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in blank.items()}
        return blank

    def inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        dtype, factor = self.dtype, self.pipeline.vae_scale_factor
        size = (x_t.shape[-2] * factor, x_t.shape[-1] * factor)
        sizes = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=dtype)  # original, crop's corner, target
        told = {"text_embeds": condition["text_embeds"].to(dtype), "time_ids": sizes.expand(len(x_t), -1)}
        return {"added_cond_kwargs": told}

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super().to_vae(latents) * std + mean

    def from_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super().from_vae((latents - mean) / std)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's channels, `[1, C, 1, 1]`; 0 and 1 where it has none."""
        config: Any = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return torch.zeros_like(like[:1, :, :1, :1]), torch.ones_like(like[:1, :, :1, :1])
        return like.new_tensor(mean).reshape(1, -1, 1, 1), like.new_tensor(std).reshape(1, -1, 1, 1)
