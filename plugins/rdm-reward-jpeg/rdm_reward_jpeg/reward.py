"""How well an image compresses: minus the size of its JPEG."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig


class JpegCompressibility(Reward):
    """Minus the size in kB (1,000 bytes) of each image saved as a JPEG; no gradient, no prompt.

    The reward of the compressibility experiments in arXiv 2305.13301 (DDPO), with its quality of 95. Smooth images
    score high; `-1*jpeg` in a spec asks for detail instead.
    """

    name = "jpeg"
    capabilities = Capabilities(space="pixel", gradient="none", range=(-float("inf"), 0.0), parameters=0)
    preprocessing = "8 bits, JPEG by Pillow, 4:2:0"

    class Config(RewardConfig):
        quality: int = Field(default=95, ge=1, le=100)
        """Pillow's JPEG quality."""

    config: Config

    def score(self, batch: RewardBatch) -> Tensor:
        pixels = (batch.images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._kilobytes(Image.fromarray(image)) for image in pixels])

    def _kilobytes(self, image: Image.Image) -> float:
        buffer = BytesIO()
        image.save(buffer, format="JPEG", quality=self.config.quality, subsampling="4:2:0")
        return buffer.tell() / 1000
