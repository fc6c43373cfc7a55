"""Pictures that a data set's column names or holds, for rewards that compare with a reference."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from rdm_sdk.errors import DataError, shown
from rdm_sdk.rewards.images import read_images
from rdm_sdk.vision.preprocess import resize, to_8_bits


class PictureColumn:
    """Reads the entries of a column as pictures of one size; each file is read and decoded once.

    An entry is the path of a file, a PIL image, an 8-bit array `[H, W, 3]`, floats `[3, H, W]` in [0, 1], or what
    `datasets.Image(decode=False)` gives: a mapping with `bytes` or `path`. A picture is scaled until it covers the
    wanted size (bicubic, as PIL), and its middle is cut out. Files are turned as their camera said, before that.

    Args:
        name: the column's, for messages.
        keep: how many decoded files are kept, in 8 bits at their wanted size; those used last.
    """

    def __init__(self, name: str, keep: int = 256) -> None:
        self.name, self.keep = name, keep
        self._kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def __call__(self, entries: Sequence[object], size: Sequence[int]) -> Tensor:
        """Return RGB pictures `[N, 3, H, W]`, float32 in [0, 1], on the CPU.

        Args:
            entries: N of them.
            size: height and width; such as `batch.images.shape[-2:]`.

        Raises:
            DataError: a file is missing or holds no picture, or an entry is something else.
        """
        height, width = size
        return torch.stack([self._picture(entry, row, (height, width)) for row, entry in enumerate(entries)])

    def _picture(self, entry: object, row: int, size: tuple[int, int]) -> Tensor:
        where = f"column {self.name!r}, row {row}"
        file, key = _source(entry)
        if file is None:
            return _fitted(read_images([entry], where, DataError), size)
        place = (key, *size)
        if place not in self._kept:
            picture = _fitted(read_images([upright(file, f"{where}: {shown(key, 120)}")], where, DataError), size)
            self._kept[place] = (picture * 255).round().to(torch.uint8)
        self._kept.move_to_end(place)
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return self._kept[place].float() / 255


@contextmanager
def opened(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Yield a file's picture, of which no more than the header is read; the block is to do nothing but use it.

    Raises:
        DataError: there is no such file, or it is no picture, or is damaged, as far as the block comes; with `name`.
    """
    try:
        with Image.open(file) as picture:
            yield picture
    except Exception as error:  # of damaged files, PIL raises what it comes across: struct.error, TypeError, ...
        raise DataError(f"{name} cannot be read as a picture: {error}") from error


def upright(file: Path | BytesIO, name: str) -> Image.Image:
    """Return a file's picture as it is shown: turned as its camera said (EXIF).

    Raises:
        DataError: as `opened`.
    """
    with opened(file, name) as picture:
        return ImageOps.exif_transpose(picture)


def _source(entry: object) -> tuple[Path | BytesIO | None, str]:
    """Return what a picture is read from, and what it is remembered by; None for an entry that is one itself."""
    if isinstance(entry, Mapping):
        data, path = entry.get("bytes"), entry.get("path")
        if isinstance(data, bytes):
            return BytesIO(data), f"bytes {hashlib.sha256(data).hexdigest()}"
        entry = path
    if isinstance(entry, (str, Path)):
        path = Path(entry).expanduser()
        return path, str(path)
    return None, ""


def _fitted(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the one picture of `[1, 3, H, W]`, `[3, *size]`: scaled to cover the size, and its middle cut out."""
    height, width = pictures.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    scaled = resize(to_8_bits(pictures), covering)[0]
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return scaled[:, top : top + size[0], left : left + size[1]]
