"""What is wrong with a folder, its table or a reward is found before pictures are scored, and no score is lost."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from odd_rewards import Captioned, Compared, Located, Unkeepable, Watched
from PIL import Image, PngImagePlugin

from rdm_sdk import DataError, RewardError, score_folder
from rdm_sdk.evaluation.folder import _size, read_folder

TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture(autouse=True)
def _counted_anew() -> None:
    """Count what is made and judged in this test alone."""
    Watched.made = Watched.judged = 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one picture, 10 pixels high and 20 wide."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("made", [False, True], ids=["named", "object"])
def test_a_column_that_options_ask_for_must_be_there(folder: Path, made: bool) -> None:
    """Only a reward that is made knows it; nothing is judged without, and other text is not read in its place."""
    reward: Any = Captioned(column="caption") if made else "odd_rewards:Captioned[column=caption]"
    with pytest.raises(RewardError, match=r"[Cc]aptioned' needs a column 'caption'"):
        score_folder(folder, reward, {"a.png": 'a sign with "open" on it'}, progress=False)
    assert Watched.judged == 0
    table = folder / "prompts.csv"
    table.write_text("file_name,prompt,caption\na.png,a sign,open\n", encoding="utf-8")
    assert score_folder(folder, reward, table, progress=False).files == ["a.png"]


@pytest.mark.parametrize("made", [False, True], ids=["named", "object"])
def test_a_reward_that_compares_is_refused(folder: Path, made: bool) -> None:
    """Each picture is judged alone, so it would say of every one what it says of no difference."""
    reward: Any = Compared() if made else "odd_rewards:Compared"
    with pytest.raises(RewardError, match=r"ompared' compares the samples of one prompt, .*score_folder judges each"):
        score_folder(folder, reward, "names", progress=False)
    assert Watched.judged == 0


def _noise(path: Path) -> bytes:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_png_is_named(folder: Path, damage: str) -> None:
    """In the middle of its pixels too, whoever reads it."""
    content = bytearray(_noise(folder / "bad.png"))
    content[60] ^= 0xFF
    (folder / "bad.png").write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(DataError, match=r"bad\.png' cannot be read as a picture: "):
        score_folder(folder, "jpeg", progress=False)
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"bad\.png' cannot be read as a picture: "):
        read_folder(folder)


def _tiff(kind: int, value: bytes) -> bytes:
    """Return EXIF whose one entry is an orientation of some type."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, 1) + value.ljust(4, b"\0") + bytes(4)


@pytest.mark.parametrize(
    "orientation", [_tiff(3, b"\x09"), _tiff(2, b"6"), _tiff(3, b"\x06")], ids=["out of range", "text", "turned"]
)
def test_odd_orientations_turn_as_pil_turns(folder: Path, orientation: bytes) -> None:
    """One that means nothing leaves a picture as it is, beside others of its size."""
    Image.new("RGB", (20, 10), "red").save(folder / "odd.jpg", exif=orientation)
    turned = orientation == _tiff(3, b"\x06")
    assert _size(folder / "odd.jpg") == ((20, 10) if turned else (10, 20))
    Image.new("RGB", (10, 20), "red").save(folder / "tall.jpg")
    assert len(score_folder(folder, "jpeg", progress=False).scores["jpeg"]) == 3


def test_exif_that_pil_cannot_read_is_named(folder: Path) -> None:
    """WebP hands over what is no EXIF at all."""
    Image.new("RGB", (20, 10), "red").save(folder / "bad.webp", exif=b"Exif\0\0" + b"nonsense")
    with pytest.raises(DataError, match=r"bad\.webp' cannot be read as a picture: not a TIFF file"):
        score_folder(folder, "odd_rewards:Watched", progress=False)
    assert Watched.made == 0


def test_no_png_is_decoded_for_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header tells, and the EXIF that stands before the pixels."""
    Image.new("RGB", (20, 10), "red").save(folder / "turned.png", exif=TURNED)

    def never(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    assert _size(folder / "a.png") == (10, 20)
    assert _size(folder / "turned.png") == (20, 10)


def test_exif_behind_the_pixels(folder: Path) -> None:
    """A PNG may have it there; such a picture is turned, and judged with others of the size that it then has."""
    path = folder / "late.png"
    Image.new("RGB", (20, 10), "red").save(path, exif=TURNED)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    chunk = content[start : start + 12 + length]
    path.write_bytes(content.replace(chunk, b"").replace(content[-12:], chunk + content[-12:]))
    Image.new("RGB", (10, 20), "red").save(folder / "tall.png")
    found = score_folder(folder, "odd_rewards:Watched", progress=False)
    assert found.files == ["a.png", "late.png", "tall.png"]
    with pytest.raises(DataError, match=r"must be of one size; got a\.png: 10 x 20, late\.png: 20 x 10"):
        read_folder(folder)


def test_a_name_that_is_no_text_is_refused_first(folder: Path) -> None:
    """It could be written into no table once everything is scored."""
    try:
        os.rename(folder / "a.png", os.fsencode(folder) + b"/caf\xe9.png")  # noqa: PTH104 - these bytes are no UTF-8
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match=r"the name of the picture 'caf\\udce9\.png' cannot be saved"):
        score_folder(folder, "odd_rewards:Watched", progress=False)
    assert Watched.made == 0


def test_a_prompt_that_is_no_text_is_refused_first(folder: Path) -> None:
    """Half of a pair of surrogates, as JSON can hold it."""
    with pytest.raises(DataError, match=r"the prompt 'a \\ud800' cannot be saved"):
        score_folder(folder, "odd_rewards:Watched", {"a.png": "a \ud800"}, progress=False)


def test_two_lines_for_a_picture_are_refused(folder: Path) -> None:
    """Neither is guessed to be meant."""
    table = folder / "prompts.csv"
    table.write_text("file_name,prompt\na.png,first\nb.png,other\na.png,second\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts\.csv' has 2 lines for 'a\.png'; leave one"):
        score_folder(folder, "jpeg", table, progress=False)


def test_what_a_reward_is_kept_with_is_written(folder: Path, tmp_path: Path) -> None:
    """A path is a text in the file."""
    found = score_folder(folder, [Located(), "jpeg"], progress=False)
    content = json.loads(found.save(tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["provenance"]["rewards"]["located"]["weights"] == str(Path("some/weights.pt"))
    assert content["provenance"]["rewards"] == found.provenance["rewards"]


def test_what_cannot_be_kept_is_found_before_scoring(folder: Path) -> None:
    """By the reward's name."""
    with pytest.raises(RewardError, match=r"'unkeepable': provenance\(\) must return what JSON can hold.*keys must be"):
        score_folder(folder, Unkeepable(), progress=False)
    assert Watched.judged == 0
