"""Stable Diffusion 1.x and 2.x: a UNet on discrete DDPM steps that predicts the noise or v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import Network
from rdm_sdk.families.ddpm import DDPMFamily
from rdm_sdk.types import Condition


class SDFamily(DDPMFamily):
    """`StableDiffusionPipeline`: a UNet, and one CLIP text encoder.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: None; CLIP's number of tokens is fixed.

    Raises:
        ConfigError: `max_sequence_length` was given.
        ModelError: the UNet wants to be told a guidance scale, as LCM-distilled ones.
    """

    component = "unet"

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline)
        if max_sequence_length is not None:
            raise ConfigError(
                f"max_sequence_length={max_sequence_length} is for T5 and language models; {type(pipeline).__name__} "
                "has CLIP alone, whose number of tokens is fixed: leave it at None"
            )
        if self.backbone.config.time_cond_proj_dim is not None:
            raise ModelError(
                f"the unet of {self.base_name!r} has time_cond_proj_dim, as LCM-distilled ones have: it is to be told "
                "the guidance scale (timestep_cond), which training does not do; load a base without it, such as the "
                "one that it was distilled from"
            )

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def example_encoding(self, count: int) -> Condition:
        encoder = self.pipeline.text_encoder
        shape = count, encoder.config.max_position_embeddings, encoder.config.hidden_size
        return {"encoder_hidden_states": torch.zeros(shape, dtype=encoder.dtype, device=self.device)}

    @property
    def default_size(self) -> tuple[int, int]:
        size, factor = self.backbone.config.sample_size, self.pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        return height * factor, width * factor

    @property
    def size_unit(self) -> int:
        # Below the deepest level, the UNet's skip connections no longer meet what it samples up.
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.backbone.config.down_block_types) - 1))

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        return network(
            role,
            sample=x_t.to(dtype),
            timestep=self.timesteps(sigma),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            **self.inputs(x_t, condition),
        )

    def inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """Return what the UNet takes besides state, time and text."""
        return {}

    def feature_block(self) -> nn.Module:
        block: nn.Module = self.backbone.mid_block
        return block

    @property
    def feature_width(self) -> int:
        return int(self.backbone.config.block_out_channels[-1])
