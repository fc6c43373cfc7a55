"""`score_folder` and `rdm-sdk score`: pictures on disk, with their prompts, into JSON or CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_sdk import DataError, RewardError, digits, score_folder, score_images
from rdm_sdk.cli.main import main
from rdm_sdk.evaluation.folder import prompt_of, read_folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with pictures of two sizes and three kinds, named by their digits."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    images = (digits.heldout_images() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for row, label in enumerate(digits.heldout_labels()[:6].tolist()):
        place = folder / ("more" if row == 5 else ".") / f"{digits.DIGIT_WORDS[label]}_{row:03d}"
        picture = Image.fromarray(images[row])
        if row == 2:
            picture = picture.resize((48, 40))
        picture.save(place.with_suffix((".png", ".webp")[row % 2]), lossless=True)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    return folder


def test_scores_are_those_of_score_images(pictures: Path) -> None:
    """In the files' order, whatever their sizes; prompts by file name."""
    found = score_folder(pictures, "legibility + jpeg", "names", progress=False)
    assert len(found.files) == 6
    assert found.prompts is not None
    for row, (name, prompt) in enumerate(zip(found.files, found.prompts, strict=True)):
        pixels = np.asarray(Image.open(pictures / name).convert("RGB"))
        image = as_image(pixels)
        expected = score_images("legibility + jpeg", image, [prompt]).outputs
        for label, output in expected.items():
            assert found.scores[label][row] == pytest.approx(float(output.scores), abs=1e-5)
    assert found.summaries["legibility"]["mean"] > 0.9
    assert found.provenance["rewards"]["legibility"]["preprocessing"]


def as_image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_prompts_come_from_a_file(pictures: Path, tmp_path: Path, kind: str) -> None:
    """By file name, as Hugging Face's image folders have them; a picture without a line is an error."""
    files = score_folder(pictures, "jpeg", progress=False).files
    rows = [{"file_name": name, "prompt": "the digit seven, really"} for name in reversed(files)]
    path = tmp_path / f"metadata.{kind}"

    def write(content: list[dict[str, str]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, ["file_name", "prompt"])
                writer.writeheader()
                writer.writerows(content)
            else:
                file.writelines(json.dumps(row) + "\n" for row in content)

    write(rows)
    assert set(score_folder(pictures, "legibility", path, progress=False).prompts or ()) == {"the digit seven, really"}
    write(rows[1:])
    with pytest.raises(DataError, match="1 of 6 pictures have no line, 'three"):
        score_folder(pictures, "legibility", path, progress=False)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("a_red_fox_0012.png", "a red fox"), ("seven.webp", "seven"), ("area_51_0.png", "area 51"), ("7.png", "7")],
)
def test_a_file_name_is_a_prompt(name: str, prompt: str) -> None:
    """Underscores are spaces, and a number at the end is none of it."""
    assert prompt_of(name) == prompt


def test_pictures_that_cannot_be_scored_are_named(pictures: Path, tmp_path: Path) -> None:
    """Damaged ones, those of transparent ones, folders without any, rewards without prompts, sets of several sizes."""
    with pytest.raises(RewardError, match="reads prompts"):
        score_folder(pictures, "legibility", progress=False)
    with pytest.raises(DataError, match="no pictures in"):
        score_folder(_empty(tmp_path), "jpeg", progress=False)
    with pytest.raises(DataError, match=r"must be of one size; got .*40 x 48"):
        read_folder(pictures)
    (pictures / "bad.png").write_bytes((pictures / "more").glob("*").__next__().read_bytes()[:60])
    with pytest.raises(DataError, match=r"bad.png' (cannot be read|is damaged)"):
        score_folder(pictures, "jpeg", progress=False)
    Image.new("RGBA", (6, 4), (255, 0, 0, 99)).save(pictures / "bad.png")
    with pytest.raises(DataError, match=r"bad.png'.*partly transparent"):
        score_folder(pictures, "jpeg", progress=False)


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_deep_and_turned_pictures(tmp_path: Path) -> None:
    """16 bits are scaled by their range, and a picture is turned as its camera said."""
    Image.fromarray(np.full((4, 6), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert read_folder(tmp_path).amin() == 1
    (tmp_path / "deep.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_folder(tmp_path).shape == (1, 3, 6, 4)
    Image.new("RGB", (4, 6), "red").save(tmp_path / "upright.jpg")
    assert score_folder(tmp_path, "jpeg", progress=False).files == ["turned.jpg", "upright.jpg"]


def test_the_command_writes_json_and_csv(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the output's name ends, with the means on the console."""
    for name in ("scores.json", "scores.csv"):
        words = ["score", str(pictures), "--rewards", "jpeg", "--prompts", "names", "--output", str(tmp_path / name)]
        assert main(words) == 0
        assert "| jpeg" in capsys.readouterr().out
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == [row["file_name"] for row in content["images"]]
    assert [float(row["jpeg"]) for row in rows] == pytest.approx([row["jpeg"] for row in content["images"]])
    assert content["rewards"]["jpeg"]["images"] == 6


def test_one_picture_has_no_interval(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interval of no width would call it certain."""
    found = score_folder(pictures / "more", "jpeg", progress=False)
    assert (found.summaries["jpeg"]["low"], found.summaries["jpeg"]["high"]) == (None, None)
    assert main(["score", str(pictures / "more"), "--rewards", "jpeg", "--output", str(tmp_path / "one.json")]) == 0
    assert " to " not in capsys.readouterr().out
