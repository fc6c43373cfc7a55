"""CLIPScore on a tiny random CLIP."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from rdm_sdk import RewardError, score_images
from rdm_sdk.testing import save_tiny_clip, tiny_tokenizer
from rdm_sdk.vision import ImageTransform


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP on disk."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_score_is_the_cosine(folder):
    """The score is the cosine that transformers' own forward pass gives, on the stated preprocessing."""
    images, prompts = torch.rand(4, 3, 40, 48, generator=torch.Generator().manual_seed(0)), ["a", "bc", "a d", "x"]
    ours = score_images(f'clip[path="{folder}"]', images, prompts).outputs["clip"].scores
    tokens = tiny_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=ImageTransform(32)(images))
    cosine = (F.normalize(theirs.image_embeds, dim=-1) * F.normalize(theirs.text_embeds, dim=-1)).sum(-1)
    assert torch.allclose(ours, cosine, atol=1e-5)
    assert ours.std() > 1e-3


def test_no_clip_there(tmp_path):
    """A folder without a CLIP, and a hub id that cannot be had, are clear errors."""
    with pytest.raises(RewardError, match=r"cannot be loaded.*path="):
        score_images(f'clip[path="{tmp_path}"]', torch.rand(1, 3, 32, 32), ["a"])
