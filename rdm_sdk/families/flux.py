"""FLUX.1, and what it shares with FLUX.2."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.families.base import Network
from rdm_sdk.families.features import middle
from rdm_sdk.families.flow import PackedFlowFamily, unpack
from rdm_sdk.types import Condition


class TwoStreamFamily(PackedFlowFamily):
    """A flow whose text and image tokens go through blocks of two streams first, and of one stream then."""

    call_length = 512

    @abstractmethod
    def inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """Return what the backbone takes besides tokens and time: conditions, and the places of all tokens."""

    def tokens(self, latents: Tensor) -> Tensor:
        """Return latents `[N, C, h, w]` as the backbone takes them, `[N, h w / 4, 4 C]`."""
        return PackedFlowFamily.pack(self, latents)

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        flow = network(
            role,
            hidden_states=self.tokens(x_t).to(dtype),
            # Rounded before the division, as the pipeline does it: in half precision, the other order is another time.
            timestep=self.timesteps(sigma).to(dtype) / 1000,
            **self.inputs(x_t, condition),
        )
        return unpack(flow, *x_t.shape[-2:])

    def feature_block(self) -> nn.Module:
        return middle([*self.backbone.transformer_blocks, *self.backbone.single_transformer_blocks])


class FluxFamily(TwoStreamFamily):
    """`FluxPipeline`: FLUX.1 [dev], which is told the guidance scale, and [schnell], which takes no guidance.

    The pipeline can guide by two passes as well (`true_cfg_scale`), which neither was made for; training does not.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call; None means the call's default, 512.
            Padding is not masked, so the number matters: [schnell] is meant to get 256 at most.

    Raises:
        ConfigError: `max_sequence_length` is above 512 or below 1.
    """

    required = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.check_length(1, 512)
        self.guidance = "embedded" if self.backbone.config.guidance_embeds else "none"

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
            )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def example_encoding(self, count: int) -> Condition:
        first, second = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        shape = count, self.max_sequence_length, second.config.d_model
        embeds = torch.zeros(shape, dtype=second.dtype, device=self.device)
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": embeds.new_zeros(count, first.config.hidden_size),
        }

    def inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        dtype = self.dtype
        text = condition["encoder_hidden_states"].to(dtype)
        return {
            "encoder_hidden_states": text,
            "pooled_projections": condition["pooled_projections"].to(dtype),
            "guidance": condition["guidance"] if self.guidance == "embedded" else None,
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": places(x_t, axes=3).to(dtype),
            "joint_attention_kwargs": {},
        }


def places(latents: Tensor, axes: int) -> Tensor:
    """Return where the tokens of latents `[N, C, h, w]` are, `[h w / 4, axes]`: row and column on axes 1 and 2."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(rows, columns, axes, dtype=torch.long, device=latents.device)
    ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=latents.device)
    return ids.flatten(0, 1)
