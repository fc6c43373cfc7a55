"""Aesthetic predictors: a small head on CLIP's (or SigLIP's) embedding of an image, without a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel

from rdm_sdk import Capabilities, RewardBatch, RewardError
from rdm_sdk.rewards.base import Reward, RewardConfig
from rdm_sdk.vision import (
    ClipReward,
    ImageTransform,
    find_file,
    load_checked,
    load_clip,
    load_pretrained,
    read_tensors,
)

Variant = Literal["v1", "v2", "v2.5"]

ENCODERS: dict[Variant, str] = {
    "v1": "openai/clip-vit-large-patch14",
    "v2": "openai/clip-vit-large-patch14",
    "v2.5": "google/siglip-so400m-patch14-384",
}
"""What the heads were trained on, in `transformers` format on the hub."""
FILES: dict[Variant, str] = {
    "v1": "sa_0_4_vit_l_14_linear.pth",
    "v2": "sac+logos+ava1-l14-linearMSE.pth",
    "v2.5": "aesthetic_predictor_v2_5.pth",
}
PROJECTS: dict[Variant, str] = {
    "v1": "https://github.com/LAION-AI/aesthetic-predictor",
    "v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    "v2.5": "https://github.com/discus0434/aesthetic-predictor-v2-5",
}
FIRST: dict[Variant, str] = {"v1": "weight", "v2": "layers.0.weight", "v2.5": "scoring_head.0.weight"}
"""The name of a head's first matrix, which tells the variants apart."""
MIRROR, MIRRORED_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
"""TRL's copy of the head of v2 on the hub; the others have none there."""


class AestheticScore(Reward):
    """An aesthetic predictor: an affine function of the unit embedding of an image, on a scale of 1 to 10, unbounded.

    LAION's v2 (the default) reads CLIP ViT-L/14 and was trained on ratings from SAC, LAION-Logos and AVA; good pictures
    score 5.2 to 6.0. LAION's v1 is a single linear layer on the same. v2.5 reads SigLIP so400m at 384 pixels and rates
    illustrations too; its author calls 5.5 and more great. The CLIP is shared with the reward `clip`.
    """

    class Config(ClipReward.Config):
        variant: Variant = "v2"
        """Which head; as in `aesthetic:v1`."""
        path: str | None = None
        """The head: a local file, or a folder or hub id that holds it under its original name. v1 and v2.5 need it."""
        revision: str | None = None
        """Revision of the head's hub repository."""
        clip_path: str | None = None
        """A hub id or local folder with the CLIP (of v2.5: the SigLIP) that the head was trained on, in `transformers`
        format; by default the one on the hub."""
        clip_revision: str | None = None
        """Revision of that one's hub repository."""

    name = "aesthetic"
    capabilities = Capabilities(space="pixel", gradient="autograd", parameters=428_544_482)
    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        variant = self.config.variant
        file = find_head(self.config.path, variant, self.config.revision)
        tensors = read_tensors(file)  # before the CLIP, which is a thousand times as large
        load = SiglipEncoder.load if variant == "v2.5" else load_clip
        source = self.config.clip_path or ENCODERS[variant]
        self.encoder = load(source, self.config.clip_revision, self.config.torch_dtype)
        width = (
            self.encoder.width if isinstance(self.encoder, SiglipEncoder) else self.encoder.model.config.projection_dim
        )
        what = f"aesthetic:{variant} at {str(file)!r}"
        check_head(tensors, variant, width, what)
        self.head = make_head(variant, width)
        load_checked(self.head, tensors, what)
        if variant == "v2.5":
            half = (0.5, 0.5, 0.5)
            self.transform = ImageTransform(self.encoder.image_size, "stretch", half, half)
        else:
            self.transform = ImageTransform(self.encoder.image_size, middle="round")
        self.transform = replace(self.transform, antialias=self.config.antialias)
        self.preprocessing = str(self.transform)

    def score(self, batch: RewardBatch) -> Tensor:
        """Return the predicted ratings, float32 `[N]`."""
        scores: Tensor = self.head(self.encoder.embed_images(self.transform(batch.images)))
        return scores.squeeze(-1)


class SiglipEncoder(nn.Module):
    """SigLIP's vision tower, frozen: images to unit vectors, by its attention pooling."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.image_size: int = model.config.image_size
        self.width: int = model.config.hidden_size

    @classmethod
    def load(cls, source: str, revision: str | None, dtype: torch.dtype) -> SiglipEncoder:
        """Return the vision tower of a SigLIP, with its text tower beside it or not, at a hub id or local folder."""
        return cls(load_pretrained(SiglipVisionModel, source, "SigLIP", revision, dtype))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Map preprocessed images `[N, 3, H, W]` to unit vectors, float32 `[N, D]`; differentiable."""
        return F.normalize(self.model(pixel_values=pixels.to(self.model.dtype)).pooler_output.float(), dim=-1)


def _affine(*widths: int, plain: int) -> nn.Sequential:
    """Return linear layers of some widths without activations; all but the last `plain` are followed by dropout.

    Dropout does nothing by now, but it counts as a layer in a checkpoint's names.
    """
    steps = list(itertools.pairwise(widths))
    dropped = [part for i, o in steps[:-plain] for part in (nn.Linear(i, o), nn.Identity())]
    return nn.Sequential(*dropped, *(nn.Linear(i, o) for i, o in steps[-plain:]))


class _Laion(nn.Module):
    """The head of v2, `[N, D]` to `[N, 1]`: `layers.0`, `.2`, `.4`, `.6` and `.7`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = _affine(width, 1024, 128, 64, 16, 1, plain=2)

    def forward(self, embeddings: Tensor) -> Tensor:
        ratings: Tensor = self.layers(embeddings)
        return ratings


class _Siglip(nn.Module):
    """The head of v2.5, `[N, D]` to `[N, 1]`: `scoring_head.0`, `.2`, `.4`, `.6` and `.8`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scoring_head = _affine(width, 1024, 128, 64, 16, 1, plain=1)

    def forward(self, embeddings: Tensor) -> Tensor:
        ratings: Tensor = self.scoring_head(embeddings)
        return ratings


def make_head(variant: Variant, width: int) -> nn.Module:
    """Return the head of a variant for embeddings of some width, frozen."""
    head = nn.Linear(width, 1) if variant == "v1" else _Laion(width) if variant == "v2" else _Siglip(width)
    return head.requires_grad_(False).eval()


def find_head(path: str | None, variant: Variant, revision: str | None = None) -> Path:
    """Return the file of a head: at `path`, or for v2 on the hub.

    Raises:
        RewardError: there is none; says which file to download from where.
    """
    name = FILES[variant]
    download = f'download {name} from {PROJECTS[variant]} and pass its place: aesthetic:{variant}[path="/.../{name}"]'
    if path is None and variant != "v2":
        raise RewardError(f"aesthetic:{variant} needs the file of its head, which is not on the hub; {download}")
    try:
        return find_file(MIRROR, MIRRORED_FILE, revision) if path is None else find_file(path, name, revision)
    except RewardError as error:
        raise RewardError(f"aesthetic:{variant} lacks its head: {error} Or {download}") from error


def check_head(tensors: Mapping[str, Tensor], variant: Variant, width: int, what: str) -> None:
    """Refuse another variant's head, and one for embeddings of another width.

    Raises:
        RewardError: it is such a head.
    """
    for other, first in FIRST.items():
        if FIRST[variant] not in tensors and first in tensors:
            raise RewardError(
                f"the checkpoint of {what} is the head of {other}, by the names in it; ask for aesthetic:{other}, or "
                f"pass the file {FILES[variant]} from {PROJECTS[variant]}"
            )
    weight = tensors.get(FIRST[variant])
    if weight is not None and weight.ndim == 2 and weight.shape[1] != width:
        encoder = "SigLIP" if variant == "v2.5" else "CLIP"
        raise RewardError(
            f"the head of {what} reads embeddings of width {weight.shape[1]}, and the {encoder} gives {width}; pass as "
            f"clip_path= the {encoder} that the head was trained on ({ENCODERS[variant]} for {FILES[variant]})"
        )
