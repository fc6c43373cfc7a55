"""Qwen2-VL with HPSv3's head: its images as differentiable patches, its weights by name, its score.

Facts are those of MizzenAI/HPSv3 (MIT license): the class `Qwen2VLRewardModelBT` of hpsv3/model/qwen2vl_trainer.py, as
hpsv3/config/HPSv3_7B.yaml makes it (`rm_head_type: ranknet`, `output_dim: 2`, `use_special_tokens: true`,
`max_pixels: 200704`) and hpsv3/inference.py calls it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel, Qwen2VLPreTrainedModel

from rdm_reward_hpsv3.text import AFTER_IMAGE, BEFORE_IMAGE, REWARD_TOKEN, after_image
from rdm_sdk import RewardError
from rdm_sdk.vision import CLIP_MEAN, CLIP_STD, expanded, resize, unavailable
from rdm_sdk.vision.preprocess import to_8_bits

PIXELS = 256 * 28 * 28
"""What every image is resized to, about, whatever its size: least and most pixels of the training."""
MAX_RATIO = 200
"""Of the sides of an image, as in Qwen2-VL's own preprocessing."""


class _Network(Qwen2VLPreTrainedModel):
    """Qwen2-VL without its language head, and HPSv3's head, which is float32 in any case."""

    _keep_in_fp32_modules_strict = ["rm_head"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        self.model = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.get_text_config().hidden_size, 1024),
            nn.ReLU(),
            nn.Identity(),  # dropout, which counts as a layer in the checkpoint's names
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        initialize: Any = self.post_init  # transformers leaves it without types
        initialize()


class Scorer(nn.Module):
    """HPSv3 with its tokenizer; `load_scorer` makes one."""

    def __init__(self, network: _Network, tokenizer: Any) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self._controls = list(tokenizer.get_added_vocab())
        self._before = self._tokens(BEFORE_IMAGE)

    def can_read(self, prompt: str) -> bool:
        """Whether a prompt is free of the model's control tokens, which would be read as images, roles or scores."""
        return not any(control in prompt for control in self._controls)

    def score(self, images: Tensor, prompts: Sequence[str], pixels: int = PIXELS) -> Tensor:
        """Return HPSv3's mu, float32 `[N]`, for RGB images `[N, 3, H, W]` in [0, 1]; differentiable.

        Sequences are padded on the right and attention is causal, so what is read at the reward tokens does not depend
        on the longest of them. Positions are counted through the image: HPSv3 hands the model embeddings without the
        ids that Qwen2-VL's three-dimensional positions are made of.
        """
        vision: Any = self.network.config.vision_config
        seen = patches(prepare(images, vision.patch_size * vision.spatial_merge_size, pixels), vision)
        language, device = self.network.model.language_model, self.network.device
        read = [self._tokens(after_image(prompt)) for prompt in prompts]
        padding = self.tokenizer.pad_token_id
        longest = max(map(len, read))
        ids = torch.tensor([tokens + [padding] * (longest - len(tokens)) for tokens in read], device=device)
        embed = language.embed_tokens
        before = embed(torch.tensor(self._before, device=device)).expand(len(read), -1, -1)
        embedded = torch.cat([before, self._embed_images(*seen), embed(ids)], dim=1)
        states = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
        ends = embedded.shape[1] - longest - 1 + torch.tensor([len(tokens) for tokens in read], device=device)
        read_at: Tensor = states[torch.arange(len(read), device=device), ends]
        mu: Tensor = self.network.rm_head(read_at.float())[:, 0]
        return mu  # the other output is how unsure the model is

    def _embed_images(self, flat: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map patches `[N, h * w, D]` on a grid (h, w) to embeddings `[N, tokens, width]`."""
        visual = self.network.model.visual
        grids = torch.tensor([[1, *grid]] * len(flat), device=flat.device)
        embedded: Tensor = visual(flat.flatten(0, 1).to(self.network.dtype), grid_thw=grids).pooler_output
        apart: Tensor = embedded.unflatten(0, (len(flat), -1))
        return apart

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def resized(height: int, width: int, unit: int, pixels: int) -> tuple[int, int]:
    """Return the height and width that an image becomes: multiples of `unit`, about `pixels` in all, shape kept.

    As `smart_resize` with `min_pixels` and `max_pixels` alike (hpsv3/dataset/utils.py, after qwen-vl-utils): rounded,
    then rounded down where that is too many pixels and up where it is too few.

    Raises:
        RewardError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise RewardError(
            f"hpsv3 cannot judge images of {height} x {width} pixels: Qwen2-VL takes no side of more than {MAX_RATIO} "
            "times the other"
        )
    rounded = [max(unit, round(side / unit) * unit) for side in (height, width)]
    area, scale = math.prod(rounded), math.sqrt(pixels / (height * width))
    if area > pixels:
        rounded = [max(unit, math.floor(side * scale / unit) * unit) for side in (height, width)]
    elif area < pixels:
        rounded = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    return rounded[0], rounded[1]


def prepare(images: Tensor, unit: int, pixels: int = PIXELS) -> Tensor:
    """Map images `[N, 3, H, W]` in [0, 1] to normalized ones of sides that `unit` divides, as PIL resizes them."""
    images = to_8_bits(images.float())
    images = resize(images, resized(images.shape[-2], images.shape[-1], unit, pixels))
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def patches(images: Tensor, vision: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return images `[N, 3, H, W]` as Qwen2-VL's patches `[N, h * w, D]`, and the grid (h, w).

    The patches that are merged into one token stand together; each is repeated in time, as for a film of a still
    picture. `vision` is a `Qwen2VLVisionConfig`. It is what `Qwen2VLImageProcessor` of transformers does, in torch.
    """
    size, merged = vision.patch_size, vision.spatial_merge_size
    grid = images.shape[-2] // size, images.shape[-1] // size
    split = images.unflatten(-1, (grid[1] // merged, merged, size)).unflatten(-4, (grid[0] // merged, merged, size))
    # [N, C, h, mh, ph, w, mw, pw] to [N, h, w, mh, mw, C, ph, pw]
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)
    repeated = ordered.unsqueeze(-3).expand(*[-1] * 6, vision.temporal_patch_size, -1, -1)
    return repeated.flatten(5).flatten(1, 4), grid


def load_scorer(tensors: Mapping[str, Tensor], base: str, what: str, dtype: torch.dtype) -> Scorer:
    """Return HPSv3 from its tensors, with the architecture and the tokenizer of a Qwen2-VL.

    Args:
        tensors: by the names of the checkpoint, in either layout (see `renamed`).
        base: hub id or local folder with the Qwen2-VL's `config.json` and tokenizer; its weights are not read.
        what: the checkpoint's name in errors.
        dtype: of the weights but the head's.

    Raises:
        RewardError: the tensors are not HPSv3's, or the base is not the Qwen2-VL that it was made of.
    """
    tensors = renamed(tensors)
    embedding = tensors.get("model.language_model.embed_tokens.weight")
    if embedding is None or not any(name.startswith("rm_head.") for name in tensors):
        raise RewardError(
            f"the checkpoint of {what} does not fit: it lacks a Qwen2-VL's embeddings or HPSv3's head (rm_head), and "
            f"holds {', '.join(sorted(tensors)[:3])} and so on; is it another model's?"
        )
    config, tokenizer = _load_base(base)
    if len(tokenizer) != len(embedding):
        raise RewardError(
            f"the tokenizer of {base!r} does not fit {what}: with {REWARD_TOKEN} it has {len(tokenizer)} tokens, the "
            f"checkpoint has {len(embedding)}; pass as base= the Qwen2-VL that it was made of"
        )
    config.text_config.vocab_size = len(embedding)
    loader: Any = _Network
    network, report = loader.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    shapes = sorted(str(key[0]) for key in report["mismatched_keys"])
    found = {"missing": report["missing_keys"], "not expected": report["unexpected_keys"], "of another shape": shapes}
    faults = [f"{title}: {', '.join(sorted(names)[:3])} ({len(names)})" for title, names in found.items() if names]
    if faults:
        raise RewardError(
            f"the checkpoint of {what} does not fit the architecture of {base!r}: {'; '.join(faults)}; is it another "
            "model's?"
        )
    return Scorer(network.requires_grad_(False).eval(), tokenizer)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by today's names, without the language head, which nothing reads.

    Checkpoints of transformers before 4.52 have the language model as `model.` and the vision tower as `visual.`;
    later ones have `model.language_model.` and `model.visual.`.
    """
    names = {name: re.sub(r"^visual\.", "model.visual.", name) for name in tensors}
    names = {
        name: re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", new)
        for name, new in names.items()
    }
    return {new: tensors[name] for name, new in names.items() if new != "lm_head.weight"}


def _load_base(base: str) -> tuple[Any, Any]:
    """Return a Qwen2-VL's config, and its tokenizer with HPSv3's token."""
    try:
        config = AutoConfig.from_pretrained(expanded(base))
        tokenizer = AutoTokenizer.from_pretrained(expanded(base))
    except Exception as error:
        raise unavailable(base, error, "Qwen2-VL") from error
    if not isinstance(config, Qwen2VLConfig):
        raise RewardError(f"{base!r} holds a model of type {config.model_type!r}; hpsv3 needs a Qwen2-VL as base=")
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    for token in (*re.findall(r"<\|\w+\|>", BEFORE_IMAGE), AFTER_IMAGE, REWARD_TOKEN):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise RewardError(f"the tokenizer of {base!r} has no token {token}; pass as base= a Qwen2-VL")
    return config, tokenizer
