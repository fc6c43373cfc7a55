"""Checks of what is evaluated, before anything is computed: a bad pixel must not reach an eigen-decomposition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdm_sdk.errors import DataError


def check_images(images: object, name: str = "images") -> Tensor:
    """Return `images` if it is a set of RGB images: float `[N, 3, H, W]` in [0, 1], all of them finite.

    Raises:
        DataError: it is not; names what was given and how to convert it.
    """
    wanted = f"{name} must be RGB images, float [N, 3, H, W] in [0, 1]"
    if not isinstance(images, Tensor):
        raise DataError(f"{wanted}; got a {type(images).__name__}. Stack pictures of one size with torch.stack")
    got = f"{wanted}; got {list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    if images.ndim != 4 or images.shape[1] != 3:
        hint = ". Channels come second: images.permute(0, 3, 1, 2)" if images.shape[-1:] == (3,) else ""
        raise DataError(f"{got}{hint}")
    if not images.is_floating_point():
        raise DataError(f"{got}. Divide 8-bit images by 255: images.float() / 255")
    if not images.numel():
        raise DataError(f"{got}: there are none")
    broken = (~images.isfinite()).flatten(1).any(1)
    if broken.any():
        raise DataError(
            f"{name} hold NaN or infinite pixels: {int(broken.sum())} of {len(images)}, the first of them image "
            f"{int(broken.nonzero()[0])}. Look at what made them; a model in half precision may have overflowed"
        )
    low, high = (float(bound) for bound in images.aminmax())
    if low < 0 or high > 1:
        hint = "map [-1, 1] by x / 2 + 0.5" if low < 0 else "divide 8-bit images by 255"
        raise DataError(f"{name} must lie in [0, 1]; they span [{low:.4g}, {high:.4g}]: {hint}")
    return images


def check_prompts(images: Tensor, prompts: Sequence[str], name: str = "images") -> None:
    """Raise `DataError` unless there is one prompt per image."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        count = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DataError(f"{len(images)} {name} do not go with {count}; give a list with one prompt per image")


def check_features(features: object, name: str = "features", least: int = 2) -> Tensor:
    """Return features as float64 `[N, D]`, finite, of at least `least` images.

    Raises:
        DataError: they are not such a matrix.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        got = f"{list(features.shape)} {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"{name} must be a float matrix [N, D], a row per image; got {got}")
    if len(features) < least:
        raise DataError(f"{name} must be of at least {least} images; got {len(features)}")
    if not bool(features.isfinite().all()):
        raise DataError(f"{name} hold NaN or infinity: the feature extractor overflowed, or its images did")
    return features.detach().to("cpu", torch.float64)


def check_same_width(features: Tensor, reference: Tensor) -> None:
    """Raise `DataError` unless two sets of features `[N, D]` have the same D."""
    if features.shape[1] != reference.shape[1]:
        raise DataError(
            f"features of width {features.shape[1]} and {reference.shape[1]} cannot be compared; extract both with the "
            "same model"
        )
