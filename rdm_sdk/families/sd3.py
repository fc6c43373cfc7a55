"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.base import Network
from rdm_sdk.families.flow import FlowFamily
from rdm_sdk.types import Condition


class SD3Family(FlowFamily):
    """`StableDiffusion3Pipeline`: rectified flow, joint attention over CLIP and T5 tokens.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call; None means the call's default, 256. A
            pipeline without T5 gets that many rows of zeros, so 0 saves their cost where the base was trained without.

    Raises:
        ConfigError: `max_sequence_length` is below 0 or above 512, which the pipeline's call refuses.
    """

    required = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    call_length = 256

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.check_length(0, 512)
        # The last block returns the image alone, so nothing asks what its text tokens attend to.
        self.lora_excluded = (f"transformer_blocks.{len(self.backbone.transformer_blocks) - 1}.attn.add_q_proj",)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def example_encoding(self, count: int) -> Condition:
        encoder, config = self.pipeline.text_encoder, self.backbone.config
        tokens = encoder.config.max_position_embeddings + self.max_sequence_length
        embeds = torch.zeros(count, tokens, config.joint_attention_dim, dtype=encoder.dtype, device=self.device)
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": embeds.new_zeros(count, config.pooled_projection_dim),
        }

    @property
    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.patch_size)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        shape = super().latent_shape(height, width)
        most = self.backbone.config.pos_embed_max_size * self.pipeline.patch_size
        if max(shape[1:]) > most:
            raise ConfigError(
                f"{height} x {width} pixels are too large for {self.base_name!r}, whose position embedding ends at "
                f"{most * self.pipeline.vae_scale_factor}; use a smaller height and width"
            )
        return shape

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        return network(
            role,
            hidden_states=x_t.to(dtype),
            timestep=self.timesteps(sigma),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            pooled_projections=condition["pooled_projections"].to(dtype),
        )
