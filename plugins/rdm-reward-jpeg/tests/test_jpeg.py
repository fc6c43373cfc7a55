"""JPEG compressibility."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from rdm_reward_jpeg.reward import JpegCompressibility

from rdm_sdk import RewardError, score_images
from rdm_sdk.testing import check_reward


def kilobytes(image, quality):
    """The size of an image `[3, H, W]` in [0, 1] as Pillow saves it."""
    buffer = BytesIO()
    picture = Image.fromarray(np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    picture.save(buffer, "jpeg", quality=quality, subsampling=2)
    return len(buffer.getvalue()) / 1000


@pytest.fixture
def noise():
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spec", "quality"), [("jpeg", 95), ("jpeg[quality=30]", 30)])
def test_score_is_the_size(noise, spec, quality):
    """The score is minus the kilobytes that Pillow writes, at the quality asked for."""
    scores = next(iter(score_images(spec, noise).outputs.values())).scores
    assert scores.tolist() == pytest.approx([-kilobytes(image, quality) for image in noise])


def test_flat_beats_noise(noise):
    """What has nothing in it is smaller, and a lower quality makes everything smaller."""
    batch = torch.cat([torch.full((1, 3, 40, 56), 0.4), noise[:1]])
    flat, grainy = score_images("jpeg", batch).outputs["jpeg"].scores
    assert grainy < flat < 0
    coarse = next(iter(score_images("jpeg[quality=20]", batch).outputs.values())).scores
    assert coarse[1] > grainy


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_quality_out_of_range(quality):
    """A quality that JPEG does not have is an error that names the option."""
    with pytest.raises(RewardError, match=rf"jpeg.*quality.*{quality}"):
        JpegCompressibility(quality=quality)


def test_contract():
    """The reward keeps the SDK's contract."""
    check_reward("jpeg")
