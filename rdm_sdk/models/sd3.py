"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rdm_sdk.core.noise import FlowSchedule
from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.models.base import ModelAdapter, Network
from rdm_sdk.types import Condition


class SD3Adapter(ModelAdapter):
    """`StableDiffusion3Pipeline`: rectified flow, joint attention over CLIP and T5 tokens.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call; None means the call's default, 256. A
            pipeline without T5 gets that many rows of zeros, so 0 saves their cost where the base was trained without.
    """

    component = "transformer"
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    schedule = FlowSchedule()
    prediction = "flow"

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = 256 if max_sequence_length is None else max_sequence_length
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ModelError(
                f"SD3 needs a FlowMatchEulerDiscreteScheduler; got {type(pipeline.scheduler).__name__}. Load the "
                "pipeline with its own scheduler; the student gets one of its own."
            )

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        height, width = height or default, width or default
        unit = factor * self.pipeline.patch_size
        if height % unit or width % unit:
            raise ConfigError(f"height and width must be multiples of {unit}; got {height} x {width}")
        return (self.backbone.config.in_channels, height // factor, width // factor)

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.backbone.dtype
        return network(
            role,
            hidden_states=x_t.to(dtype),
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            pooled_projections=condition["pooled_projections"].to(dtype),
        )

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        scaled: Tensor = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
        return scaled

    def feature_block(self) -> nn.Module:
        blocks: Any = self.backbone.transformer_blocks
        middle: nn.Module = blocks[(len(blocks) - 1) // 2]
        return middle

    @property
    def feature_width(self) -> int:
        return int(self.backbone.inner_dim)

    def student_scheduler(
        self, num_steps: int, shift: float | None, stochastic: bool = True
    ) -> FlowMatchEulerDiscreteScheduler:
        config = dict(self.pipeline.scheduler.config)
        shift = config["shift"] if shift is None else shift
        # Diffusers' default grid ends next to zero, where a re-noising step is wasted. Stretching it to the terminal
        # level of a uniform grid gives, without shift, 1, 3/4, 1/2, 1/4 for four steps.
        last = 1 / num_steps
        terminal = shift * last / (1 + (shift - 1) * last) if num_steps > 1 else None
        overrides = {"shift": shift, "shift_terminal": terminal, "use_dynamic_shifting": False}
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(
            config, stochastic_sampling=stochastic, **overrides
        )
        return scheduler

    def inference_call(self, num_steps: int) -> str:
        call = f"num_inference_steps={num_steps}, guidance_scale=1.0"
        return call if self.max_sequence_length == 256 else f"{call}, max_sequence_length={self.max_sequence_length}"

    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        type(self.pipeline).save_lora_weights(
            directory, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
