"""Tiny checkpoints with open_clip's names, as the hub has them."""

from pathlib import Path

import torch
from rdm_reward_hps.reward import FILES
from transformers import CLIPConfig

from rdm_sdk.testing import tiny_clip_config, tiny_tokenizer


def shapes_of(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP (its class `CLIP`) of an architecture."""
    text, vision, out = config.text_config, config.vision_config, config.projection_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes = {
        "logit_scale": (),
        "positional_embedding": (text.max_position_embeddings, text.hidden_size),
        "text_projection": (text.hidden_size, out),
        "token_embedding.weight": (text.vocab_size, text.hidden_size),
        "visual.class_embedding": (vision.hidden_size,),
        "visual.positional_embedding": (patches + 1, vision.hidden_size),
        "visual.proj": (vision.hidden_size, out),
        "visual.conv1.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
    }
    norms = {"visual.ln_pre": vision.hidden_size, "visual.ln_post": vision.hidden_size, "ln_final": text.hidden_size}
    for tower, prefix in ((text, "transformer"), (vision, "visual.transformer")):
        width, inner = tower.hidden_size, tower.intermediate_size
        for i in range(tower.num_hidden_layers):
            block = f"{prefix}.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, (outputs, inputs) in {
                "attn.in_proj_": (3 * width, width),
                "attn.out_proj.": (width, width),
                "mlp.c_fc.": (inner, width),
                "mlp.c_proj.": (width, inner),
            }.items():
                shapes |= {f"{block}.{name}weight": (outputs, inputs), f"{block}.{name}bias": (outputs,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tiny CLIP of random weights, biases and gains, with open_clip's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(tiny_clip_config())
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, content: object, name: str = FILES["v2.1"]) -> Path:
    """Write a checkpoint with architecture and tokenizer beside it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_clip_config().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.save(content, folder / name)
    return folder / name
