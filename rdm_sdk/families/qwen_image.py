"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.errors import ModelError
from rdm_sdk.families.base import Network
from rdm_sdk.families.flow import PackedFlowFamily, unpack
from rdm_sdk.method.matching import classifier_free_guidance
from rdm_sdk.method.noise import from_x_0, to_x_0
from rdm_sdk.types import Condition


class QwenImageFamily(PackedFlowFamily):
    """`QwenImagePipeline`: rectified flow on packed latents, text from Qwen2.5-VL, and a VAE for videos.

    No prompt is a space, as the base's authors write it. Guidance keeps, token by token, the length of the flow with
    the prompt.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: tokens per prompt, 1 to 1024, as in the pipeline's call; None means the call's default,
            512. Longer prompts are cut, shorter ones cost the transformer no more.

    Raises:
        ConfigError: `max_sequence_length` is out of range.
        ModelError: the transformer wants to be told a guidance scale, which diffusers itself cannot do yet.
    """

    call_length = 512
    masks = (("encoder_hidden_states", "encoder_hidden_states_mask"),)

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.check_length(1, 1024)
        if self.backbone.config.guidance_embeds:
            raise ModelError(
                f"the transformer of {self.base_name!r} has guidance_embeds, which QwenImagePipeline cannot run; load "
                "a base without them"
            )
        # The last block computes its text tokens like the others, and the transformer drops them.
        last = f"transformer_blocks.{len(self.backbone.transformer_blocks) - 1}"
        unused = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        self.lora_excluded = tuple(f"{last}.{name}" for name in unused)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, mask = self.pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=self.max_sequence_length
            )
        if mask is None:  # nothing was padded
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = self.max_sequence_length - embeds.shape[1]
        return {
            "encoder_hidden_states": nn.functional.pad(embeds, (0, 0, 0, missing)),
            "encoder_hidden_states_mask": nn.functional.pad(mask, (0, missing)),
        }

    def example_encoding(self, count: int) -> Condition:
        encoder, length = self.pipeline.text_encoder, self.max_sequence_length
        shape = count, length, encoder.config.get_text_config().hidden_size
        embeds = torch.zeros(shape, dtype=encoder.dtype, device=self.device)
        return {
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": torch.ones(count, length, dtype=torch.long),
        }

    def encode_no_prompt(self) -> Condition:
        return self.encode_prompts([" "])

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        height, width = x_t.shape[-2:]
        mask = condition["encoder_hidden_states_mask"]
        lengths = mask.sum(1).tolist()
        longest = max(lengths)
        tokens = network(
            role,
            hidden_states=self.pack(x_t).to(dtype),
            timestep=self.timesteps(sigma).to(dtype) / 1000,  # rounded before it is divided, as in the pipeline
            encoder_hidden_states=condition["encoder_hidden_states"][:, :longest].to(dtype),
            encoder_hidden_states_mask=None if min(lengths) == longest else mask[:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            attention_kwargs={},
        )
        return unpack(tokens, height, width)

    def guide(self, x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        flow, other = (
            self.pack(from_x_0(self.schedule, self.prediction, x_0, x_t, sigma)) for x_0 in (with_prompt, without)
        )
        guided = nn.functional.normalize(classifier_free_guidance(flow, other, scale), dim=-1)
        flow = unpack(guided * flow.norm(dim=-1, keepdim=True), *x_t.shape[-2:])
        return to_x_0(self.schedule, self.prediction, flow, x_t, sigma)

    # An image is a video of one frame to the VAE, [N, C, 1, h, w].

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, 0]

    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(images[:, :, None])

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents * std + mean)[:, :, None]

    def from_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents[:, :, 0] - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's channels, `[1, C, 1, 1]`."""
        config = self.pipeline.vae.config
        mean, std = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)

    def guidance_call(self, scale: float) -> dict[str, Any]:
        # The pipeline warns of a guidance_scale, which only a backbone that is told it would use.
        return {"true_cfg_scale": scale} | ({"negative_prompt": " "} if scale > 1 else {})
