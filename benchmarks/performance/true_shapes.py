"""Published pipelines without their weights: the configs, which are public, and the same with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.planning.blueprint import blueprint

CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_G: dict[str, Any] = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
T5_XXL: dict[str, Any] = {
    "model_type": "t5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
VAE_16 = VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_16 |= {"use_quant_conv": False, "use_post_quant_conv": False}
SD3_MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SDXL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
FLUX_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
CLIP, CLIP_WITH = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTextModelWithProjection"]
T5 = ["transformers", "T5EncoderModel"]

Parts = dict[str, tuple[list[str], dict[str, Any]]]
PIPELINES: dict[str, Parts] = {
    "StableDiffusion3Pipeline": {
        "text_encoder": (CLIP_WITH, CLIP_L),
        "text_encoder_2": (CLIP_WITH, CLIP_G),
        "text_encoder_3": (T5, T5_XXL),
        "transformer": (["diffusers", "SD3Transformer2DModel"], SD3_MEDIUM),
        "vae": (["diffusers", "AutoencoderKL"], VAE_16),
        "scheduler": (["diffusers", "FlowMatchEulerDiscreteScheduler"], FLOW),
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": (CLIP, CLIP_L),
        "text_encoder_2": (CLIP_WITH, CLIP_G),
        "unet": (["diffusers", "UNet2DConditionModel"], SDXL),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"latent_channels": 4, "scaling_factor": 0.13025}),
        "scheduler": (["diffusers", "EulerDiscreteScheduler"], EULER),
    },
    "FluxPipeline": {
        "text_encoder": (CLIP, CLIP_L),
        "text_encoder_2": (T5, T5_XXL),
        "transformer": (["diffusers", "FluxTransformer2DModel"], FLUX_DEV),
        "vae": (["diffusers", "AutoencoderKL"], VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "scheduler": (["diffusers", "FlowMatchEulerDiscreteScheduler"], FLOW | {"use_dynamic_shifting": True}),
    },
}
"""Pipelines by their classes: components with library, class and config."""
_NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
_SMALL_VAE: dict[str, Any] = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
_SHALLOW: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 1}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "StableDiffusion3Pipeline": {
        "text_encoder": _NARROW | _SHALLOW,
        "text_encoder_2": _NARROW | _SHALLOW,
        "transformer": {
            "attention_head_dim": 32,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "num_attention_heads": 2,
            "num_layers": 1,
            "pooled_projection_dim": 64,
        },
        "vae": _SMALL_VAE,
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": _NARROW | _SHALLOW,
        "text_encoder_2": _NARROW | _SHALLOW,
        "unet": {
            "addition_time_embed_dim": 8,
            "attention_head_dim": [1, 2, 4],
            "block_out_channels": [32, 64, 128],
            "cross_attention_dim": 64,
            "layers_per_block": 1,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "transformer_layers_per_block": [1, 1, 2],
        },
        "vae": _SMALL_VAE,
    },
    "FluxPipeline": {
        "text_encoder": _NARROW | _SHALLOW,
        "text_encoder_2": {"d_ff": 64, "d_kv": 32, "d_model": 64, "num_heads": 2, "num_layers": 1},
        "transformer": {
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "joint_attention_dim": 64,
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_single_layers": 2,
            "pooled_projection_dim": 32,
        },
        "vae": _SMALL_VAE,
    },
}
"""What of the configs is smaller where nothing but that a program runs is to be seen."""


def write_configs(folder: Path, kind: str, tiny: bool = False, **without: None) -> str:
    """Write the configs of a pipeline, as the hub has them, but for the parts named `without`; return the folder.

    Those of `tiny` ones have a layer of everything, and narrow ones.
    """
    smaller = TINY[kind] if tiny else {}
    parts = {
        name: (named, config | smaller.get(name, {}))
        for name, (named, config) in PIPELINES[kind].items()
        if name not in without
    }
    index: dict[str, Any] = {"_class_name": kind, **{name: named for name, (named, _) in parts.items()}}
    index |= {
        f"tokenizer{name.removeprefix('text_encoder')}": ["transformers", "CLIPTokenizer"]
        for name in PIPELINES[kind]
        if "text" in name
    }
    index |= {name: [None, None] for name in without}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (_, config) in parts.items():
        (folder / name).mkdir(exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    return str(folder)


def random_family(folder: str, device: str, dtype: torch.dtype = torch.bfloat16) -> ModelFamily:
    """Return a family with random weights on a device, which answers every prompt with random encodings."""
    family = blueprint(folder, dtype)
    for part in (family.backbone, *family.frozen_parts().values()):
        part.to_empty(device=device)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        family.device = torch.device(device)
        return {name: torch.randn_like(tensor) for name, tensor in family.example_encoding(len(prompts)).items()}

    family.encode_prompts = encode  # type: ignore[method-assign]
    return family
