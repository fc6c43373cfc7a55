"""Tiny models of the true classes with random weights, made offline, for tests of reward plugins."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a `CLIPTokenizer` that spells texts in single letters; 16 tokens at most."""
    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=16)


def tiny_clip_config(image_size: int = 32, width: int = 32) -> CLIPConfig:
    """Return the architecture of a CLIP of two layers a tower, for `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": image_size, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width // 2)


def save_tiny_clip(folder: str | Path, seed: int = 0, image_size: int = 32, width: int = 32) -> Path:
    """Write a tiny `CLIPModel` with random weights and its tokenizer, as `from_pretrained` reads them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(tiny_clip_config(image_size, width))
        for parameter in model.parameters():  # as small as CLIP starts, embeddings of all images would be alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
