"""Tiny tokenizers and models of the true classes with random weights, made offline, for tests of plugins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's form of chats. Who wants no thinking gets an empty thought: FLUX.2 does, Z-Image does not."""


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a `CLIPTokenizer` that spells texts in single letters; 16 tokens at most."""
    entries = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=16)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Return a `T5Tokenizer` that spells texts in single letters and ends them with `</s>`; 512 tokens at most."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a `GemmaTokenizer` that spells texts in single letters, or bytes, after `<bos>`."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=True)


def tiny_qwen_tokenizer(template: str = "") -> Qwen2Tokenizer:
    """Return a `Qwen2Tokenizer` that spells texts in bytes, with Qwen3's way to write chats.

    Args:
        template: its words, outside `<|...|>`, become one token each, as they are for the published tokenizer.
    """
    split: Any = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word for text in re.split(r"<\|\w+\|>", template) for word, _ in split(text)]
    # From left to right, a letter at a time, so that words that begin alike do not take each other's letters away.
    merges: Any = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    pieces = [*sorted(ByteLevel.alphabet()), *(start + letter for start, letter in merges)]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=QWEN_CHAT,
        model_max_length=4096,
    )


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


def randomized(pipeline: Any) -> Any:
    """Draw all weights of a pipeline from the global random state, put it in evaluation mode, and return it.

    As networks start, some outputs are zero and the embeddings of all texts are alike. Here every layer keeps the size
    of what it gets, and scales of norms stay as they are.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
            for name, parameter in part.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
    return pipeline
