"""Diversity of a group on a tiny random DINOv2."""

import json
import shutil

import pytest
import torch
from rdm_reward_dino.reward import DinoDiversity, mean_distance
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.testing import check_reward, save_tiny_clip
from rdm_sdk.vision import IMAGENET_MEAN, IMAGENET_STD, ImageTransform


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DINOv2 on disk."""
    path = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Like the real ones, it was trained at another size than it is used at, so positions are interpolated.
        model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


def images(count=6, height=40, width=48, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_score_is_the_mean_distance_to_the_others(folder):
    """Scores are mean cosine distances within groups, by transformers' own forward pass and a loop over pairs."""
    pictures = images()
    ours = score_images(f'dino[path="{folder}"]', pictures, group_size=3).outputs["dino"].scores
    transform = ImageTransform(224, resize_to=256, mean=IMAGENET_MEAN, std=IMAGENET_STD, middle="round")
    with torch.no_grad():
        cls = Dinov2Model.from_pretrained(folder).eval()(pixel_values=transform(pictures)).pooler_output
    for group in (range(3), range(3, 6)):
        for i in group:
            apart = [1 - F.cosine_similarity(cls[i], cls[j], dim=0) for j in group if j != i]
            assert ours[i] == pytest.approx(float(sum(apart) / 2), abs=1e-5)
    assert ours.std() > 1e-4


def test_mean_over_the_group_is_the_mean_over_pairs():
    """The group's mean is its mean pairwise distance, and the score stays inside [0, 2]."""
    generator = torch.Generator().manual_seed(0)
    units = F.normalize(torch.randn(3, 5, 8, generator=generator, dtype=torch.float64), dim=-1)
    pairs = 1 - units @ units.mT
    mean = pairs.sum((1, 2)) / (5 * 4)
    assert torch.allclose(mean_distance(units).mean(1), mean)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert mean_distance(opposite).tolist() == [[2.0, 2.0]]
    assert mean_distance(opposite[:, :1].expand(-1, 3, -1)).tolist() == [[0.0, 0.0, 0.0]]


def test_copies_and_lone_samples(folder):
    """A group of copies scores 0, with a gradient of 0; a group of one does not apply."""
    reward = DinoDiversity(path=str(folder))
    copies = RewardBatch.from_images(images(2).repeat_interleave(2, 0), group_size=2)
    output = evaluate_reward(reward, copies)
    assert torch.allclose(output.scores, torch.zeros(4), atol=1e-6)
    assert output.gradient.abs().max() < 1e-6
    assert reward.score(RewardBatch.from_images(images(2))).isnan().all()
    with pytest.raises(RewardError, match="nothing to compare with: score_images takes a group_size"):
        score_images(reward, images(2))


def test_gradient_and_ascent(folder):
    """Every sample has a gradient, and a step along it makes the group more diverse."""
    reward, start = DinoDiversity(path=str(folder)), images()
    output = evaluate_reward(reward, RewardBatch.from_images(start, group_size=3))
    assert (output.gradient.flatten(1).abs().amax(1) > 0).all()
    uphill = (start + 0.02 * F.normalize(output.gradient.flatten(1), p=torch.inf).view_as(start)).clamp(0, 1)
    raised = evaluate_reward(reward, RewardBatch.from_images(uphill, group_size=3), gradients_of=()).scores
    assert raised.mean() > output.scores.mean()


def test_contract(folder):
    """The reward keeps the SDK's contract."""
    check_reward(DinoDiversity(path=str(folder)))


def test_wrong_checkpoints(folder, tmp_path):
    """Missing and misshapen tensors, another model and something else altogether are clear errors."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    gone = next(name for name in tensors if "layer.1" in name and "query" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, damaged / "model.safetensors")
    with pytest.raises(RewardError, match=r"does not fit DINOv2: missing \['.*1.*'\]"):
        DinoDiversity(path=str(damaged))
    config = json.loads((folder / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(RewardError, match="of another shape"):
        DinoDiversity(path=str(damaged))
    with pytest.raises(RewardError, match=r"type 'clip'.*dinov2"):
        DinoDiversity(path=str(save_tiny_clip(tmp_path / "clip")))
    text = tmp_path / "notes.pt"
    text.write_text("these are no weights")
    with pytest.raises(RewardError, match=r"cannot be loaded.*path="):
        DinoDiversity(path=str(text))
    with pytest.raises(RewardError, match=r"cannot be loaded.*path="):
        DinoDiversity(path=str(tmp_path / "nowhere"))
