"""PickScore on a tiny random CLIP."""

import pickle

import pytest
import torch
from rdm_reward_pickscore.reward import HUB, PickScore
from transformers import CLIPImageProcessor, CLIPModel

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.testing import check_reward, save_tiny_clip, tiny_tokenizer

PROMPTS = ["a", "bc", "a d", "x"]
CODE_RAN = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP on disk, with a logit scale as large as PickScore's."""
    folder = save_tiny_clip(tmp_path_factory.mktemp("pickscore"))
    model = CLIPModel.from_pretrained(folder)
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 41, 57, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


def test_score_is_the_logit(folder, images):
    """The score is the logit that transformers' own processor and forward pass give."""
    ours = score_images(f'pickscore[path="{folder}"]', images, PROMPTS).outputs["pickscore"].scores
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(list((images * 255).to(torch.uint8)), return_tensors="pt").pixel_values
    tokens = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels).logits_per_image.diag()
    assert torch.allclose(ours, theirs, atol=0.05)  # of a scale of 100: PIL rounds a few pixels the other way
    assert ours.std() > 0.5


def test_score_is_the_scaled_cosine(folder, images):
    """The score is exp(logit scale) times what `clip` says of the same model, and bounded by it."""
    reward = PickScore(path=str(folder))
    ours = reward.score(RewardBatch.from_images(images, PROMPTS))
    cosine = score_images(f'clip[path="{folder}"]', images, PROMPTS).outputs["clip"].scores
    assert torch.allclose(ours, torch.tensor(4.6052).exp() * cosine, rtol=1e-5)
    assert reward.capabilities.range == (-reward.scale, reward.scale)
    assert reward.scale == pytest.approx(100.0, abs=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_scale(folder, dtype):
    """In weights of half precision the scale is what it was; rounded, it would be up to 1.5 % off."""
    reward = PickScore(path=str(folder), dtype=dtype)
    assert reward.encoder.model.visual_projection.weight.dtype == getattr(torch, dtype)
    assert reward.scale == PickScore(path=str(folder)).scale


def test_contract(folder):
    """The contract kit has nothing to object to: gradients are there, ascent raises the score, and so on."""
    check_reward(PickScore(path=str(folder)))


def test_from_the_hub(monkeypatch, folder):
    """The authors' repository is the default, and `pickscore@abc` a revision of it."""
    asked = []
    tiny = PickScore(path=str(folder)).encoder
    monkeypatch.setattr("rdm_reward_pickscore.reward.load_clip", lambda *given: asked.append(given) or tiny)
    PickScore(revision="abc")
    assert asked == [(HUB, "abc", torch.float32)]


@pytest.mark.parametrize("lost", ["visual_projection.weight", "logit_scale"])
def test_missing_weights(tmp_path, lost):
    """A checkpoint that lacks a weight is not filled up with a random one."""
    folder = save_tiny_clip(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    model.save_pretrained(folder, state_dict={n: t for n, t in model.state_dict().items() if n != lost})
    with pytest.raises(RewardError, match=f"does not fit CLIP: missing .*{lost}"):
        PickScore(path=str(folder))


def test_weights_of_another_shape(tmp_path):
    """Nor is one of another size cut to fit."""
    folder, other = save_tiny_clip(tmp_path / "a"), save_tiny_clip(tmp_path / "b", width=64)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(RewardError, match=r"does not fit CLIP: .*of another shape"):
        PickScore(path=str(folder))


class Bomb:
    """Pickled, it appends to a list when it is read by an unpickler that runs code."""

    def __reduce__(self):
        return CODE_RAN.append, (1,)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3944517836\n"),
        ("pytorch_model.bin", b"<!DOCTYPE html>\n<html><body>Not found</body></html>"),
        ("pytorch_model.bin", pickle.dumps({"weights": Bomb()}, protocol=2)),
    ],
    ids=["git-lfs pointer", "html", "code"],
)
def test_not_a_checkpoint(tmp_path, name, content):
    """What is no checkpoint is a clear error, and code in it is not run."""
    folder = save_tiny_clip(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(RewardError, match=r"cannot be loaded: .*Pass path="):
        PickScore(path=str(folder))
    assert not CODE_RAN


def test_no_model_there(tmp_path):
    """An empty folder, and a file instead of a folder, are clear errors."""
    (tmp_path / "model.pt").write_text("no weights")
    for path in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(RewardError, match=r"cannot be loaded: .*Pass path="):
            PickScore(path=str(path))
