"""Differentiable image preprocessing that gives what PIL gives.

Reward models were trained on 8-bit images resized by PIL, and their scores move when the resize does. PIL resizes in
two one-dimensional passes, width first, and rounds to 8 bits after each; so does this, with rounding that gradients
pass straight through. Since version 13, Pillow resizes images more than about twice as tall as wide by height first;
the models were trained and their scores published with earlier ones, so width comes first here in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Round(torch.autograd.Function):
    """Clamp to [0, 1] and round to 8 bits; gradients pass the rounding unchanged, and nothing outside of [0, 1]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        # In place, because this touches every pixel of full-size images. Halves go up, as in PIL; torch.round would
        # send them to the even neighbor.
        return images.clamp(0, 1).mul_(255).add_(0.5).floor_().div_(255)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (images,), (gradient,) = ctx.saved_tensors, gradients
        inside: Tensor = gradient * ((images >= 0) & (images <= 1))
        return inside


def to_8_bits(images: Tensor) -> Tensor:
    """Clamp images to [0, 1] and round them to multiples of 1/255; the rounding passes gradients unchanged."""
    apply: Any = _Round.apply  # torch leaves it without types
    rounded: Tensor = apply(images)
    return rounded


def resize(images: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Resize 8-bit images `[N, 3, H, W]` (multiples of 1/255 in [0, 1]) to `size` (height, width) as PIL does, bicubic.

    Args:
        images: the images.
        size: height and width to resize to.
        antialias: False leaves out the low-pass filter, the rounding and the clamping, as torchvision did to float
            tensors before 0.17. Some published scores were computed so; most of the pixels then get no gradient.
    """
    if not antialias:
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    for passed in ((images.shape[-2], size[1]), size):
        if images.shape[-2:] != passed:
            images = to_8_bits(F.interpolate(images, size=passed, mode="bicubic", align_corners=False, antialias=True))
    return images


@dataclass(frozen=True)
class ImageTransform:
    """From RGB images in [0, 1] of any size to what a vision model takes.

    `fit="crop"`: the shorter side becomes `resize_to` (by default `size`), then the middle is cut out, as
    `CLIPImageProcessor` does. `fit="pad"`: the longer side becomes `size`, the rest is black. `fit="stretch"`: both
    sides become `size`.
    """

    size: int
    fit: Literal["crop", "pad", "stretch"] = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_to: int | None = None
    antialias: bool = True
    middle: Literal["floor", "round"] = "floor"
    """Where the middle begins when an odd number of pixels is cut away: rounded down, as by `CLIPImageProcessor`, or to
    the nearest, halves to even, as by torchvision's `CenterCrop`, which many original models were trained with."""

    def __str__(self) -> str:
        """A short name, to be kept with the scores."""
        target = self.size if self.resize_to is None else self.resize_to
        filtered = "bicubic" if self.antialias else "bicubic without antialiasing"
        return f"8 bits, {filtered} to {target}, {self.fit} {self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to normalized float32 `[N, 3, size, size]`; differentiable."""
        images = to_8_bits(images.float())
        height, width = images.shape[-2:]
        if self.fit == "stretch":
            images = resize(images, (self.size, self.size), self.antialias)
        elif self.fit == "pad":
            scale = self.size / max(height, width)
            fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = resize(images, fitted, self.antialias)
            down, right = self.size - fitted[0], self.size - fitted[1]
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        else:
            target, shorter = self.size if self.resize_to is None else self.resize_to, min(height, width)
            fitted = (target * height // shorter, target * width // shorter)
            images = resize(images, fitted, self.antialias)
            top, left = ((length - self.size) / 2 for length in fitted)
            top, left = (int(start) if self.middle == "floor" else round(start) for start in (top, left))
            images = images[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std
