"""`folder_distance` and `rdm-sdk distance`: two folders of pictures, of any sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from rdm_sdk import ConfigError, DataError, digits, folder_distance
from rdm_sdk.cli.main import main
from rdm_sdk.evaluation.distances import frechet_interval, kernel_distance


def pooled(images: Tensor) -> Tensor:
    """Return the means of 2 x 2 fields, `[N, 12]`."""
    return F.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two folders of 30 and 20 digits, every third of them larger."""
    pixels = (digits.heldout_images()[:50] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    places = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    for row, picture in enumerate(pixels):
        image = Image.fromarray(picture)
        side = 32 if row % 3 else 64
        image.resize((side, side), Image.Resampling.NEAREST).save(places[row >= 30] / f"{row:03d}.png")
    return places


def test_figures_are_those_of_the_features(folders: tuple[Path, Path]) -> None:
    """Whatever the sizes, of all pictures of both."""
    found = folder_distance(*folders, pooled, device="cpu", progress=False)
    features = pooled((digits.heldout_images()[:50] * 255).round() / 255)
    expected = frechet_interval(features[:30], features[30:])
    assert found.figures["frechet"] == pytest.approx(expected.value, rel=1e-4)
    assert found.figures["low"] < found.figures["frechet"] < found.figures["high"]
    kernel = kernel_distance(features[:30], features[30:], subset_size=10)
    assert abs(found.figures["kernel"] - kernel.mean) < kernel.deviation  # other pictures in its subsets
    assert found.notes == []
    assert list(found.provenance["pictures"].values()) == [30, 20]
    assert found.provenance["features"].endswith("test_folder_distance.pooled")


def test_the_command_prints_and_writes(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, what makes the figures doubtful, and a file with all they are kept with."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    words = ["distance", *map(str, folders), "--features", str(tmp_path / "dino"), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "distance.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.split()[1:4] == ["FID", "|", "KID"]
    assert "note: 20 images are no more than the 36 features" in printed
    content = json.loads((tmp_path / "distance.json").read_text(encoding="utf-8"))
    assert {"frechet", "kernel", "precision", "coverage"} <= content["figures"].keys()
    assert "stretch 224" in content["provenance"]["features"]


def test_too_few_pictures_and_no_features_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Before a network is loaded."""
    for row in range(15):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{row}.png")
    with pytest.raises(DataError, match=r"must hold at least 16 pictures.*got 15"):
        folder_distance(folders[0], tmp_path, "dinov2", progress=False)
    with pytest.raises(ConfigError, match="there are no features 'clip'"):
        folder_distance(*folders, "clip", progress=False)
