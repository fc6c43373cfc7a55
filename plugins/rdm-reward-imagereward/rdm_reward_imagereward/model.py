"""The network of ImageReward, and its checkpoint, whose names are those of the original BLIP code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from rdm_sdk import RewardError
from rdm_sdk.vision import expanded, load_checked, read_tensors, unavailable

# Heads and epsilons leave no trace in a checkpoint, and BlipConfig's defaults for them are not these.
BLIP_LARGE: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
}
"""BLIP-L as ImageReward has it, in the terms of `transformers.BlipConfig`."""

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw scores, as published with the weights; the score is standardized by them."""

_HEAD_WIDTHS = (1024, 128, 64, 16, 1)
_HEAD_LAYERS = ("0", "2", "4", "6", "7")  # those between are dropout
_EXTRA_TOKENS = ["[DEC]", "[ENC]"]  # BLIP's, in this order behind BERT's; ImageReward never writes them itself
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class ImageRewardNet(nn.Module):
    """BLIP's image encoder, its text encoder looking at the image, and a head on the text's first token, frozen."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config  # its annotations still allow plain dicts
        text: Any = config.text_config
        text.is_decoder = True  # in BLIP's terms: has cross-attention; nothing becomes causal
        self.image_size = int(vision.image_size)
        """Height and width of the images that the model takes."""
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *_HEAD_WIDTHS)
        # No activations between the layers: the authors left them out, so at evaluation the head is affine.
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return standardized scores, float32 `[N]`.

        Args:
            pixels: preprocessed images `[N, 3, image_size, image_size]`.
            tokens: token ids `[N, L]`, the first of them [CLS].
            mask: 1 for tokens and 0 for padding `[N, L]`.
        """
        patches = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        raw: Tensor = self.head(text[:, 0].float())
        return (raw[:, 0] - MEAN) / STD


def load_network(path: Path, dtype: torch.dtype) -> ImageRewardNet:
    """Return the network of a checkpoint file, with the encoders in `dtype` and the head in float32.

    The architecture is `BLIP_LARGE`, or that of a `config.json` (a `BlipConfig`) in the file's folder.

    Raises:
        RewardError: the file holds something else, or does not fit the architecture.
    """
    tensors = convert_blip(read_tensors(path))
    network = _empty_network(path.parent / "config.json")
    network.to_empty(device="cpu")
    positions = network.text.embeddings.position_ids  # a buffer that is not in the state
    positions.copy_(torch.arange(positions.shape[-1])[None])
    load_checked(network, tensors, "ImageReward")
    encoders: tuple[nn.Module, ...] = (network.vision, network.text)
    for encoder in encoders:
        encoder.to(dtype)
    return network.requires_grad_(False).eval()


def _empty_network(path: Path) -> ImageRewardNet:
    """Return the network on the meta device, with the architecture of a file if there is one."""
    try:
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else BLIP_LARGE
        with torch.device("meta"):
            return ImageRewardNet(BlipConfig(text_config=given["text_config"], vision_config=given["vision_config"]))
    except Exception as error:
        raise RewardError(
            f"{str(path)!r} beside the checkpoint is no BlipConfig with text_config and vision_config "
            f"({type(error).__name__}: {error}); remove it if it has nothing to do with the checkpoint"
        ) from error


_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"norm\.(\w+)", r"post_layernorm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
)
_UNUSED = (
    r"blip\.(vision|text)_proj\.\w+",  # of BLIP's contrastive score
    r"blip\.text_encoder\.embeddings\.position_ids",  # a constant
)


def convert_blip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an ImageReward checkpoint to those of `ImageRewardNet`.

    The text encoder's names are BERT's in both, and the image encoder's q, k and v are fused in both.

    Raises:
        RewardError: a name that such a checkpoint does not have.
    """
    converted: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.")
        if any(re.fullmatch(pattern, name) for pattern in _UNUSED):
            continue
        renamed = _renamed(name)
        if renamed is None:
            raise RewardError(
                f"the checkpoint of ImageReward holds {full_name!r}, which the original BLIP code with its head (blip."
                "visual_encoder, blip.text_encoder, mlp.layers) does not have; is it another model's?"
            )
        converted[renamed] = tensor
    return converted


def _renamed(name: str) -> str | None:
    head = re.fullmatch(r"mlp\.layers\.(\d+)\.(\w+)", name)
    if head:
        return f"head.{_HEAD_LAYERS.index(head[1])}.{head[2]}" if head[1] in _HEAD_LAYERS else None
    if name.startswith("blip.text_encoder."):
        return "text." + name.removeprefix("blip.text_encoder.")
    if not name.startswith("blip.visual_encoder."):
        return None
    for pattern, target in _VISION_NAMES:
        match = re.fullmatch(pattern, name.removeprefix("blip.visual_encoder."))
        if match:
            return "vision." + match.expand(target)
    return None


def load_tokenizer(name: str | None, folder: Path, vocabulary: int) -> Any:
    """Return BLIP's tokenizer: BERT's and two tokens more.

    Args:
        name: a hub id or local folder; None is `folder` if there are tokenizer files in it, else "bert-base-uncased".
        folder: where the checkpoint lies.
        vocabulary: rows of the model's embedding.

    Raises:
        RewardError: there is no tokenizer, or it has more tokens than the model.
    """
    beside = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    source = name or (str(folder) if beside else "bert-base-uncased")
    try:
        tokenizer = AutoTokenizer.from_pretrained(expanded(source))
    except Exception as error:
        raise unavailable(source, error) from error
    tokenizer.add_tokens(_EXTRA_TOKENS, special_tokens=True)
    if len(tokenizer) > vocabulary:
        raise RewardError(
            f"the tokenizer {source!r} has {len(tokenizer)} tokens with BLIP's {' and '.join(_EXTRA_TOKENS)}, the "
            f"ImageReward model only {vocabulary}; pass tokenizer= the one that the model was trained with"
        )
    return tokenizer
