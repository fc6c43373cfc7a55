"""Images as judges are given them: 8 bits, as a picture or as a link that holds it."""

from __future__ import annotations

import base64
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """Round an RGB image `[3, H, W]` in [0, 1] to 8 bits."""
    return Image.fromarray((image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def png_url(image: Tensor) -> str:
    """Return an RGB image `[3, H, W]` in [0, 1], rounded to 8 bits, as a data URL of a PNG file."""
    file = BytesIO()
    to_pil(image).save(file, "PNG", compress_level=1)  # several times as fast as the default, and hardly larger
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
