"""Where features come from: DINOv2, InceptionV3, or a function of the user's.

The classifier of the embedded digits is such a function (`rdm_sdk.digits.metrics.digit_features`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError, DataError, nearest
from rdm_sdk.evaluation.images import check_features
from rdm_sdk.evaluation.inception import Inception
from rdm_sdk.vision import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, load_pretrained

Features: TypeAlias = Callable[[Tensor], Tensor]
"""RGB images `[N, 3, H, W]`, float in [0, 1], to features `[N, D]`."""

DINOV2 = "facebook/dinov2-large"
"""The ViT-L/14 of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675)."""
INCEPTION_FILE = ".pt"
"""How the path of InceptionV3 ends; every other name or path is a DINOv2's."""
NAMES = "'dinov2', 'inception', the hub id or path of another DINOv2, or the path of inception-2015-12-05.pt"
_KINDS = ("dinov2", "dinov2_with_registers")


@dataclass(frozen=True)
class Extractor:
    """A source of features, with the name that figures are kept with."""

    name: str
    extract: Features
    batch_size: int = 32

    @torch.no_grad()
    def __call__(self, images: Tensor, done: Callable[[int], object] = lambda count: None) -> Tensor:
        """Return the features, float64 `[N, D]` on the CPU, of images `[N, 3, H, W]`, uint8 or float in [0, 1].

        `done` is called with the number of images after each batch.

        Raises:
            DataError: the function returned no such features.
        """
        rows = []
        for chunk in images.split(self.batch_size):
            pixels = chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk
            features = self.extract(pixels)
            rows.append(check_features(features, f"features by {self.name}", 1))
            if len(rows[-1]) != len(chunk):
                raise DataError(f"{self.name} returned {len(rows[-1])} rows of features for {len(chunk)} images")
            done(len(chunk))
        return torch.cat(rows)


def feature_extractor(source: str | Features, device: torch.device | str = "cpu") -> Extractor:
    """Return what turns images into features.

    Args:
        source: "dinov2"; the hub id or path of another DINOv2; "inception"; the path of its file; or a function.
        device: where a network works.

    Raises:
        ConfigError: the source is none of these, or InceptionV3 cannot be had.
        RewardError: the weights of a DINOv2 cannot be loaded.
    """
    if callable(source):
        name = getattr(source, "__qualname__", None) or type(source).__name__
        return Extractor(f"{getattr(source, '__module__', '')}.{name}".lstrip("."), source)
    if source == "inception" or source.endswith(INCEPTION_FILE):
        network = Inception(None if source == "inception" else source, device)
        return Extractor(str(network), network)
    if "/" not in source and source != "dinov2" and not Path(source).exists():
        raise ConfigError(f"there are no features {source!r}: give {NAMES}.{nearest(source, ('dinov2', 'inception'))}")
    return _dinov2(DINOV2 if source == "dinov2" else source, device)


def _dinov2(place: str, device: torch.device | str) -> Extractor:
    """Return the [CLS] embedding of a DINOv2, its images prepared as FD-DINOv2 is defined (Stein et al. 2023)."""
    from transformers import AutoModel

    model = load_pretrained(AutoModel, place, "DINOv2").to(device)
    if model.config.model_type not in _KINDS:
        raise ConfigError(
            f"features={place!r} is a model of type {model.config.model_type!r}; give {NAMES}, or in Python a "
            "function of RGB images [N, 3, H, W] in [0, 1] that returns features [N, D]"
        )
    transform = ImageTransform(224, fit="stretch", mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def embed(images: Tensor) -> Tensor:
        output: Any = model(pixel_values=transform(images.to(device)))
        embedding: Tensor = output.last_hidden_state[:, 0]
        return embedding.float()

    return Extractor(f"{place} [CLS], {transform}", embed)
