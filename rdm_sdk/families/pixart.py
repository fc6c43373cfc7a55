"""PixArt-Sigma, and what Sana's pipeline has from PixArt's: masked texts, binned sizes, a variance behind the noise."""

from __future__ import annotations

from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily, Network
from rdm_sdk.families.ddpm import DDPMFamily
from rdm_sdk.families.features import middle
from rdm_sdk.types import Condition


class MaskedTextFamily(ModelFamily):
    """A transformer that attends to padded texts with their mask, and whose pipeline scales sizes unless told not to.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: tokens per prompt, as in the pipeline's call; None means the call's default, 300.

    Raises:
        ConfigError: `max_sequence_length` leaves no token to a prompt.
    """

    component = "transformer"
    call_length = 300
    masks = (("encoder_hidden_states", "encoder_attention_mask"),)
    tokens_besides: int
    """How many tokens of `max_sequence_length` are never the prompt's own."""
    pipeline_unit: int
    """The pipeline's call takes multiples of this, whatever the VAE and the patches need."""

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        if self.max_sequence_length <= self.tokens_besides:
            raise ConfigError(
                f"max_sequence_length={max_sequence_length} leaves no token to a prompt: {self.tokens_besides} of them "
                f"never are its own for {type(pipeline).__name__}; the base was trained with 300"
            )

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return self.encode(prompts)

    def encode(self, prompts: list[str], **options: Any) -> Condition:
        """Encode prompts with further options of the pipeline's `encode_prompt`."""
        with torch.no_grad():
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                **options,
            )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def example_encoding(self, count: int) -> Condition:
        encoder, length = self.pipeline.text_encoder, self.max_sequence_length
        embeds = torch.zeros(count, length, encoder.config.hidden_size, dtype=encoder.dtype, device=self.device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones(count, length, dtype=torch.long)}

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.backbone.config.sample_size * self.pipeline.vae_scale_factor
        return size, size

    @property
    def size_unit(self) -> int:
        return lcm(self.pipeline_unit, self.pipeline.vae_scale_factor * self.backbone.config.patch_size)

    def predict_at(
        self, network: Network, role: str, x_t: Tensor, timesteps: Tensor, condition: Condition, **more: Any
    ) -> Tensor:
        """Run the backbone as `predict` does, at its own timesteps `[N]` and told `more`."""
        dtype = self.dtype
        output = network(
            role,
            hidden_states=x_t.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=condition["encoder_attention_mask"],
            **more,
        )
        # The second half of 2 C channels is a variance.
        return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * self.latent_channels else output

    def inference_call(self, num_steps: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        # Otherwise it samples the nearest of a list of sizes and scales the image to the one that was asked for.
        return super().inference_call(num_steps, guidance_scale) | {"use_resolution_binning": False}

    @property
    def feature_width(self) -> int:
        config = self.backbone.config
        return int(config.num_attention_heads * config.attention_head_dim)


class PixArtFamily(MaskedTextFamily, DDPMFamily):
    """`PixArtSigmaPipeline`: a transformer on discrete DDPM steps, T5 tokens with a mask.

    Captions are never cleaned (`clean_caption`), neither in training nor by `inference_call`: the pipeline does so only
    where beautifulsoup4 and ftfy happen to be installed. They are lowercased in any case. The pipeline has no LoRA
    loader, so a student is saved in PEFT's format alone.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens per prompt, as in the pipeline's call; None means the call's default, 300.

    Raises:
        ModelError: the transformer is to be told the picture's size, as PixArt-Alpha's of 1,024 pixels; this pipeline
            tells it none.
        ConfigError: `max_sequence_length` leaves no token to a prompt.
    """

    tokens_besides = 1  # </s>
    pipeline_unit = 8

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        if self.backbone.use_additional_conditions:
            raise ModelError(
                f"{self.base_name!r} has a transformer with use_additional_conditions, which PixArtSigmaPipeline "
                "itself cannot run: it passes neither resolution nor aspect ratio. Use a PixArt-Sigma transformer"
            )

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        return self.predict_at(network, role, x_t, self.timesteps(sigma), condition, added_cond_kwargs=sizes)

    def inference_call(self, num_steps: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        return super().inference_call(num_steps, guidance_scale) | {"clean_caption": False}

    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write nothing: there is no format that the pipeline reads."""

    @property
    def loading_code(self) -> str:
        return 'from peft import PeftModel\n\nPeftModel.from_pretrained(pipe.transformer, f"{folder}/peft")  # in place'

    def feature_block(self) -> nn.Module:
        return middle(self.backbone.transformer_blocks)
