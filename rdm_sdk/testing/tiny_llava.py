"""A tiny vision-language model of the true classes with random weights, made offline, for tests of judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

LLAVA_CHAT = (
    "{% for message in messages %}USER : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def save_tiny_llava_processor(folder: str | Path, words: Sequence[str], image_size: int = 32) -> Path:
    """Write a `LlavaProcessor` whose tokenizer knows whole words, and cuts punctuation off; images go through PIL.

    Args:
        folder: where to.
        words: one token each, in this order; "<pad>", "<unk>" and "<image>" among them, and what `LLAVA_CHAT` says.
        image_size: what images are brought to, in pixels; patches have 8.
    """
    spell = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split: Any = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    spell.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spell, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    crop = {"height": image_size, "width": image_size}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)
    options: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pixels, tokenizer, patch_size=8, chat_template=LLAVA_CHAT, **options).save_pretrained(folder)
    return Path(folder)


def save_tiny_llava(folder: str | Path, words: Sequence[str], seed: int = 0, image_size: int = 32) -> Path:
    """Write a tiny `LlavaForConditionalGeneration` with random weights, and its processor; it ends no answer itself.

    Raises:
        ValueError: "<image>" or "<pad>" is not among the words.
    """
    words = list(words)
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, num_hidden_layers=3, image_size=image_size, patch_size=8)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": words.index("<pad>")}
    text = LlamaConfig(**tower, **ends, vocab_size=len(words), num_hidden_layers=2, num_key_value_heads=2)
    image = words.index("<image>")
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": image}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(LlavaConfig(**parts))
        for parameter in model.parameters():  # as small as they start, images and prompts would hardly matter
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    return save_tiny_llava_processor(folder, words, image_size)
