"""Pictures and tables for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rdm_sdk.files import replacing


def to_uint8(images: Tensor) -> Tensor:
    """Convert RGB images `[N, 3, H, W]` in [0, 1] to uint8 `[N, H, W, 3]`."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def image_grid(rows: Sequence[tuple[str, Tensor]], path: str | Path, scale: int | None = None) -> Path:
    """Write labeled rows of images as one PNG. Labels grow with the rows, to be legible on a small screen too.

    Args:
        rows: (label, images `[n, 3, H, W]` in [0, 1]) per row; all images of one size.
        path: the PNG to write, replaced as a whole.
        scale: enlarge each image by this whole factor (nearest neighbor); None: small ones to 64 pixels of width or
            somewhat less.
    """
    height, width = rows[0][1].shape[-2:]
    scale = max(1, 64 // width) if scale is None else scale
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=min(64, max(14, height // 3)))
    gap, columns = 3, max(len(images) for _, images in rows)
    label_width = 12 + int(max(font.getlength(line) for label, _ in rows for line in label.split("\n")))
    canvas = Image.new("RGB", (label_width + columns * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        top = r * (height + gap)
        draw.text((6, top + height / 2), label, fill="black", font=font, anchor="lm")
        for c, pixels in enumerate(to_uint8(images).numpy()):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + c * (width + gap), top))
    path = Path(path)
    with replacing(path) as staged:
        canvas.save(staged, format="PNG")
    return path


_LOGGED = re.compile(r"step_(\d+)\.png")


def logged_pictures(folder: Path) -> list[tuple[int, Path]]:
    """Return the pictures that `log_images` has written into a folder, each with its step, in their order."""
    return sorted((int(match[1]), path) for path in folder.glob("*.png") if (match := _LOGGED.fullmatch(path.name)))


def too_many(steps: Sequence[int], every: int, most: int) -> list[int]:
    """Return which of one or more ascending steps to leave out, so that at most `most` (2 or more) are left, evenly.

    The first and the last stay, and those at multiples of `every`, at which pictures are written, or of twice, four
    times, ... as much: what is left out once would be left out later as well.
    """
    first, last, stride = steps[0], steps[-1], every
    while len({first, last, *range(stride, last + 1, stride)}) > most:
        stride *= 2
    return [step for step in steps[1:-1] if step % stride]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns; floats are shown with four significant digits."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Return a cell of a Markdown table, which a "|" or the end of a line in it, as names may have, would end."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.splitlines()).replace("|", "\\|")
