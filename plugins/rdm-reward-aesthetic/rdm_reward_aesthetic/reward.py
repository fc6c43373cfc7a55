"""LAION's aesthetic predictors: a small head on CLIP's embedding of an image, without a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from rdm_sdk import Capabilities, RewardBatch, RewardError
from rdm_sdk.rewards.base import Reward, RewardConfig
from rdm_sdk.vision import ClipReward, ImageTransform, find_file, load_checked, load_clip, read_tensors

Variant = Literal["v1", "v2"]

CLIP_HUB = "openai/clip-vit-large-patch14"
FILES: dict[Variant, str] = {"v1": "sa_0_4_vit_l_14_linear.pth", "v2": "sac+logos+ava1-l14-linearMSE.pth"}
PROJECTS: dict[Variant, str] = {
    "v1": "https://github.com/LAION-AI/aesthetic-predictor",
    "v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
}
MIRROR, MIRRORED_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
"""TRL's copy of the head of v2 on the hub; v1 has none there."""


class AestheticScore(Reward):
    """LAION's aesthetic predictor: an affine function of the unit CLIP ViT-L/14 embedding of an image.

    v2 (the default) was trained on ratings of 1 to 10 from SAC, LAION-Logos and AVA; good pictures score 5.2 to 6.0. v1
    is a single linear layer on the same scale. Neither is bounded. The CLIP is shared with the reward `clip`.
    """

    class Config(ClipReward.Config):
        variant: Variant = "v2"
        """Which head; as in `aesthetic:v1`."""
        path: str | None = None
        """The head: a local file, or a folder or hub id that holds it under its original name. v1 needs it."""
        revision: str | None = None
        """Revision of the head's hub repository."""
        clip_path: str = CLIP_HUB
        """A hub id or local folder with the CLIP that the head was trained on, in `transformers` format."""
        clip_revision: str | None = None
        """Revision of the CLIP's hub repository."""

    name = "aesthetic"
    capabilities = Capabilities(space="pixel", gradient="autograd", parameters=428_544_482)
    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        variant = self.config.variant
        file = find_head(self.config.path, variant, self.config.revision)
        tensors = read_tensors(file)  # before the CLIP, which is a thousand times as large
        self.encoder = load_clip(self.config.clip_path, self.config.clip_revision, self.config.torch_dtype)
        width = self.encoder.model.config.projection_dim
        what = f"aesthetic:{variant} at {str(file)!r}"
        check_head(tensors, variant, width, what)
        self.head = make_head(variant, width)
        load_checked(self.head, tensors, what)
        self.transform = ImageTransform(self.encoder.image_size, antialias=self.config.antialias, middle="round")
        self.preprocessing = str(self.transform)

    def score(self, batch: RewardBatch) -> Tensor:
        """Return the predicted ratings, float32 `[N]`."""
        scores: Tensor = self.head(self.encoder.embed_images(self.transform(batch.images)))
        return scores.squeeze(-1)


class Mlp(nn.Module):
    """The head of v2, `[N, D]` to `[N, 1]`: linear layers without activations, so an affine function.

    It was trained with dropout, which counts as a layer in the checkpoint's names (`layers.0`, `.2`, `.4`, `.6`, `.7`).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        dropped = [(nn.Linear(i, o), nn.Identity()) for i, o in ((width, 1024), (1024, 128), (128, 64))]
        self.layers = nn.Sequential(*(part for pair in dropped for part in pair), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, embeddings: Tensor) -> Tensor:
        ratings: Tensor = self.layers(embeddings)
        return ratings


def make_head(variant: Variant, width: int) -> nn.Module:
    """Return the head of a variant for embeddings of some width, frozen."""
    head = nn.Linear(width, 1) if variant == "v1" else Mlp(width)
    return head.requires_grad_(False).eval()


def find_head(path: str | None, variant: Variant, revision: str | None = None) -> Path:
    """Return the file of a head: at `path`, or for v2 on the hub.

    Raises:
        RewardError: there is none; says which file to download from where.
    """
    name = FILES[variant]
    download = f'download {name} from {PROJECTS[variant]} and pass its place: aesthetic:{variant}[path="/.../{name}"]'
    if path is None and variant == "v1":
        raise RewardError(f"aesthetic:v1 needs the file of its head, which is not on the hub; {download}")
    try:
        return find_file(MIRROR, MIRRORED_FILE, revision) if path is None else find_file(path, name, revision)
    except RewardError as error:
        raise RewardError(f"aesthetic:{variant} lacks its head: {error} Or {download}") from error


def check_head(tensors: Mapping[str, Tensor], variant: Variant, width: int, what: str) -> None:
    """Refuse the other variant's head, and one for embeddings of another width.

    Raises:
        RewardError: it is such a head.
    """
    other: Variant = "v2" if variant == "v1" else "v1"
    first = {"v1": "weight", "v2": "layers.0.weight"}
    if first[variant] not in tensors and first[other] in tensors:
        raise RewardError(
            f"the checkpoint of {what} is the head of {other}, by the names in it; ask for aesthetic:{other}, or pass "
            f"the file {FILES[variant]} from {PROJECTS[variant]}"
        )
    weight = tensors.get(first[variant])
    if weight is not None and weight.ndim == 2 and weight.shape[1] != width:
        raise RewardError(
            f"the head of {what} reads embeddings of width {weight.shape[1]}, and the CLIP gives {width}; pass as "
            f"clip_path= the CLIP that the head was trained on ({CLIP_HUB} for {FILES[variant]})"
        )
