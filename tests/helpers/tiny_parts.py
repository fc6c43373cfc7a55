"""The parts that the tiny pipelines share: text encoders, tokenizers, a UNet and VAEs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from rdm_sdk.testing import tiny_clip_config, tiny_t5_tokenizer, tiny_tokenizer

ModelT = TypeVar("ModelT", CLIPTextModel, CLIPTextModelWithProjection)

WIDTH = 16
"""Channels of text encoders, except where two CLIPs must differ, and of transformers."""
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
LATENT_CHANNELS = 4
VAE_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 4,
    "sample_size": 32,
}
QWEN_VOCABULARY = 512
"""More than `tiny_qwen_tokenizer` knows, with Qwen-Image's template too."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a state of its own, and put the global one back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs too
        yield


def second_clip_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of SDXL's and SD3's second CLIP, which pads with "!", token 0."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def clip_text_encoder(kind: type[ModelT], width: int) -> ModelT:
    """Return a text encoder `[N, 16, width]`; its projection, if it has one, is `[N, width / 2]`."""
    both = tiny_clip_config(width=width)
    config: Any = both.text_config
    config.projection_dim = both.projection_dim
    return kind(config)


def t5_encoder(width: int) -> T5EncoderModel:
    """Return a text encoder `[N, L, width]` for `tiny_t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def qwen3_config(num_hidden_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=QWEN_VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDTH // 2,
        max_position_embeddings=4096,
    )


def unet(**settings: Any) -> UNet2DConditionModel:
    """Return a UNet of two levels for latents `[N, 4, H, W]`, H and W even."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,  # the number of heads, as this class understands it
        **settings,
    )


def autoencoder_kl(scaling_factor: float, shift_factor: float | None = None, quant_conv: bool = True) -> AutoencoderKL:
    """Return a VAE of images `[N, 3, 4H, 4W]` and latents `[N, 4, H, W]`."""
    return AutoencoderKL(
        **VAE_LEVELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )
