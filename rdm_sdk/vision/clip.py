"""CLIP for rewards: embeddings, shared backbones, cached prompts, and checkpoints with open_clip's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.vision.preprocess import ImageTransform
from rdm_sdk.vision.weights import PretrainedConfig, expanded, load_checked, load_pretrained, unavailable

# The heads' width is not visible in a checkpoint. open_clip pads texts with 0, which causal attention never looks at.
CLIP_VIT_H = {
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}
"""CLIP ViT-H/14 as open_clip trained it, in the terms of `transformers.CLIPConfig`."""

_MAX_CACHED_PROMPTS = 4096


class _Clip(CLIPModel):
    """A CLIP whose logit scale is float32 in any case: rounded to bfloat16, all its logits would be 1 % off."""

    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012 - as transformers declares it


class ClipEncoder(nn.Module):
    """A frozen CLIP with its tokenizer: images and prompts to unit vectors.

    Prompt embeddings are cached, and each is computed alone: in a batch, its last bits would depend on its neighbors.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        super().__init__()
        _check_tokenizer(tokenizer, model.config.text_config)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self._prompts: dict[str, Tensor] = {}

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model takes."""
        size: int = self.model.config.vision_config.image_size
        return size

    @property
    def logit_scale(self) -> float:
        """The model's learned factor of the cosine, already exponentiated."""
        return float(self.model.logit_scale.exp())

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Map preprocessed images `[N, 3, H, W]` to unit vectors, float32 `[N, D]`; differentiable."""
        pixels = pixels.to(self.model.visual_projection.weight.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Map N prompts (cut at the model's length) to unit vectors, float32 `[N, D]`."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._prompts:
                self._prompts[prompt] = self._embed_prompt(prompt)
        embedded = torch.stack([self._prompts[prompt] for prompt in prompts]).to(self.model.device)
        while len(self._prompts) > _MAX_CACHED_PROMPTS:  # only now, so that this call's own prompts were all there
            self._prompts.pop(next(iter(self._prompts)))
        return embedded

    def _embed_prompt(self, prompt: str) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(features.float(), dim=-1)[0].cpu()


_SHARED: WeakValueDictionary[tuple[object, ...], ClipEncoder] = WeakValueDictionary()


def load_clip(
    source: str, revision: str | None = None, dtype: torch.dtype = torch.float32, tokenizer: str | None = None
) -> ClipEncoder:
    """Return the CLIP at a hub id or local folder; rewards that ask for the same one share it as long as one lives.

    `tokenizer` is the hub id or local folder of its tokenizer; None is where the model is.

    Raises:
        RewardError: there is no CLIP in `transformers` format there, or no tokenizer that fits it.
    """
    path = Path(source).expanduser()
    key = (str(path.resolve()) if path.exists() else source, revision, dtype, tokenizer)
    shared = _SHARED.get(key)
    if shared is None:
        model = load_pretrained(_Clip, source, "CLIP", revision, dtype)
        words = _load_tokenizer(source, revision) if tokenizer is None else _load_tokenizer(tokenizer)
        shared = _SHARED[key] = ClipEncoder(model, words)
    return shared


def _load_tokenizer(source: str, revision: str | None = None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(expanded(source), revision=revision)
    except Exception as error:
        raise unavailable(source, error, "tokenizer") from error


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer of another model: CLIP reads a prompt's meaning where the end token stands."""
    legacy = config.eos_token_id == 2  # old configs say so and mean the highest id, see transformers' CLIPTextModel
    if len(tokenizer) > config.vocab_size or (not legacy and tokenizer.eos_token_id != config.eos_token_id):
        raise RewardError(
            f"the tokenizer {tokenizer.name_or_path!r} does not fit its CLIP: it has {len(tokenizer)} tokens and ends "
            f"texts with {tokenizer.eos_token_id}, the model has {config.vocab_size} and {config.eos_token_id}; pass "
            "the tokenizer that the model was trained with"
        )


def clip_from_open_clip(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: str,
    what: str,
    dtype: torch.dtype = torch.float32,
) -> ClipEncoder:
    """Return a CLIP from open_clip's tensors and an architecture (see `CLIP_VIT_H`).

    Raises:
        RewardError: the architecture is impossible, the tensors are not of it, or there is no tokenizer that fits.
    """
    try:
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(**config))
    except Exception as error:
        raise RewardError(
            f"the architecture of {what} cannot be built: {type(error).__name__}: {error}. Its config must be one of "
            "transformers.CLIPConfig."
        ) from error
    for part in model.children():  # not the logit scale, as in `_Clip`
        part.to(dtype)
    model.to_empty(device="cpu")
    for tower in (model.text_model, model.vision_model):  # buffers, which checkpoints leave out
        positions = tower.embeddings.position_ids
        positions.copy_(torch.arange(positions.shape[-1])[None])
    load_checked(model, convert_open_clip(tensors, what), what)
    return ClipEncoder(model, _load_tokenizer(tokenizer))


_TOWER_NAMES = (
    (r"ln_1\.", "layer_norm1."),
    (r"ln_2\.", "layer_norm2."),
    (r"attn\.out_proj\.", "self_attn.out_proj."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
)
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def convert_open_clip(tensors: Mapping[str, Tensor], what: str = "CLIP") -> dict[str, Tensor]:
    """Rename open_clip's tensors to those of `transformers.CLIPModel`; a fused in_proj becomes q, k and v.

    Raises:
        RewardError: a name that open_clip's CLIP does not have, or a matrix that cannot be one of its.
    """
    converted: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.").removeprefix("text.")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in _NAMES:
            converted[_NAMES[name]] = tensor
        elif name in _TRANSPOSED:
            _require(tensor.ndim == 2, what, full_name, tensor, "two dimensions")
            converted[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif block:
            prefix = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", block[3])
            if fused:
                divisible = tensor.ndim > 0 and len(tensor) >= 3 and len(tensor) % 3 == 0
                _require(divisible, what, full_name, tensor, "a first dimension of three equal parts")
                for part, values in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{prefix}self_attn.{part}_proj.{fused[1]}"] = values.contiguous()
            else:
                renamed = block[3]
                for pattern, target in _TOWER_NAMES:
                    renamed = re.sub(f"^{pattern}", target, renamed)
                converted[prefix + renamed] = tensor
        elif name != "attn_mask":  # a constant that some checkpoints carry along
            raise RewardError(f"the checkpoint of {what} holds {full_name!r}, which open_clip's CLIP does not have")
    return converted


def _require(fits: bool, what: str, name: str, tensor: Tensor, expected: str) -> None:
    if not fits:
        raise RewardError(
            f"the checkpoint of {what} does not fit: {name!r} has shape {list(tensor.shape)}, expected {expected}; "
            "is it another model's?"
        )


class ClipReward(Reward):
    """A reward by the cosine between an image and its prompt; subclasses load `encoder` and set `scale`.

    Score: `scale * cosine`, with the images prepared by `transform`.
    """

    capabilities = Capabilities(space="pixel", gradient="autograd", prompts=True, range=(-1.0, 1.0))

    class Config(PretrainedConfig):
        antialias: bool = True
        """False resizes without a low-pass filter, as some published scores were computed."""

    config: Config
    encoder: ClipEncoder
    transform = ImageTransform(224)
    scale = 1.0

    def use(self, encoder: ClipEncoder) -> None:
        """Take an encoder, and its image size."""
        self.encoder = encoder
        self.transform = replace(self.transform, size=encoder.image_size, antialias=self.config.antialias)
        self.preprocessing = str(self.transform)

    def score(self, batch: RewardBatch) -> Tensor:
        images = self.encoder.embed_images(self.transform(batch.images))
        return self.scale * (images * self.encoder.embed_prompts(batch.prompts)).sum(dim=-1)
