"""Pictures as people have them (PIL, 8-bit arrays), as the float tensors that rewards take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdm_sdk.errors import RDMError

_WANTED = "a PIL image, an 8-bit array [H, W, 3] or floats [3, H, W] in [0, 1]"


def read_images(pictures: Iterable[object], name: str, error_class: type[RDMError]) -> Tensor:
    """Return pictures as RGB images `[N, 3, H, W]`, float32 in [0, 1].

    Args:
        pictures: PIL images, 8-bit arrays or tensors `[H, W, 3]` (or tensors `[3, H, W]`), floats `[3, H, W]` in
            [0, 1]. 16-bit gray is scaled by its full range.
        name: what holds them, for messages.
        error_class: what is raised for an entry that is no picture, or could be meant in two ways.
    """
    images = []
    for row, entry in enumerate(pictures):
        where = f"{name}, row {row}"
        given = _rgb(entry, where, error_class) if isinstance(entry, Image.Image) else entry
        picture = _as_tensor(given)
        if not (picture.is_floating_point() and picture.ndim == 3 and picture.shape[0] == 3):
            raise error_class(
                f"{where}: a picture is {_WANTED}; got {type(entry).__name__} of shape {list(picture.shape)} and type "
                f"{picture.dtype}"
            )
        if not bool((picture.amin() >= 0) & (picture.amax() <= 1)):  # a NaN is in no range either
            raise error_class(
                f"{where}: values must lie in [0, 1] (of integers, in 0 to 255); as floats they span "
                f"[{picture.amin():.4g}, {picture.amax():.4g}]. Map [-1, 1] by x / 2 + 0.5"
            )
        images.append(picture.float())
    if not images:
        raise error_class(f"{name} holds no picture; give at least one")
    if len({image.shape for image in images}) != 1:
        raise error_class(f"{name}: its pictures differ in size; resize them to one height and width")
    return torch.stack(images)


def _as_tensor(given: Any) -> Tensor:
    """Return a picture as floats `[3, H, W]` if it can be read so, and else as whatever tensor it is."""
    try:
        picture = given if isinstance(given, Tensor) else torch.as_tensor(np.array(given))
    except (TypeError, ValueError):  # texts, None, ragged lists
        return torch.empty(0)
    whole = not (picture.is_floating_point() or picture.is_complex() or picture.dtype == torch.bool)
    if whole and picture.ndim == 3:
        # 8-bit; a data set's plain column gives wider integers
        last, first = picture.shape[2] == 3, isinstance(given, Tensor) and picture.shape[0] == 3
        if last != first:
            picture = (picture.permute(2, 0, 1) if last else picture) / 255
    return picture


def opaque(picture: Image.Image) -> Image.Image | None:
    """Return a PIL image in RGB; None if some of it shows what lies behind it, by an alpha channel or by its color."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    return whole.convert("RGB") if np.array(whole)[..., 3].min() == 255 else None


def _rgb(picture: Image.Image, where: str, error_class: type[RDMError]) -> object:
    """Return a PIL image in RGB, without what `convert` does in silence: clipping to 8 bits, dropping transparency."""
    if picture.mode.startswith("I;16"):
        gray = np.array(picture).astype(np.float32) / 65535
        return torch.from_numpy(gray).expand(3, *gray.shape)
    if picture.mode in ("I", "F"):
        raise error_class(
            f"{where}: a PIL image of mode {picture.mode!r} does not say what its white is; convert it to 8 bits"
        )
    found = opaque(picture)
    if found is None:
        raise error_class(
            f"{where}: the picture is partly transparent, so its colors depend on what lies behind it; paste it on a "
            "background"
        )
    return found
