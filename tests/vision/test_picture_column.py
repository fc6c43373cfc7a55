"""A column of reference pictures: paths, pictures and what `datasets` makes of them, decoded once, in a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from live_servers import serving
from PIL import Image

from rdm_sdk import DataError, RDMTrainer, RewardBatch, RewardError
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.serving.remote import Remote
from rdm_sdk.testing import run_reward_checks
from rdm_sdk.vision import PictureColumn

PAGE = Path(__file__).parents[2] / "docs" / "reference-image.md"
PROMPTS = ["a zero", "a one"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two pictures of other sizes: a gray one, and one whose halves are red and blue."""
    Image.new("L", (48, 40), 128).save(tmp_path / "gray.png")
    halves = np.zeros((20, 40, 3), np.uint8)
    halves[:, :20, 0], halves[:, 20:, 2] = 255, 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    return [str(tmp_path / "gray.png"), str(tmp_path / "halves.png")]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is opened as a picture."""
    seen: list[object] = []
    original = Image.open

    def watching(file: Any, *args: Any, **options: Any) -> Any:
        seen.append(file)
        return original(file, *args, **options)

    monkeypatch.setattr(Image, "open", watching)
    return seen


def cut_off() -> bytes:
    """Return a PNG whose chunk of pixels has lost the half of its content, so that nonsense follows."""
    file = BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    whole = file.getvalue()
    start = whole.index(b"IDAT") + 4
    return whole[: start - 8] + (200).to_bytes(4) + b"IDAT" + whole[start : start + 200] + b"?" * 100


def resemblance() -> Any:
    """Return the class of the page."""
    (code,) = re.findall(r"```python\n(# my_rewards.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {"__name__": "__main__"}  # a script, which the kit does not import again
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names["Resemblance"]


def test_whatever_holds_a_picture(files: list[str]) -> None:
    """Paths, PIL images, arrays, and both forms of a column of `datasets`, give the same pixels."""
    raw = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    pictures = []
    for file in files:
        with Image.open(file) as opened:
            pictures.append(opened.convert("RGB"))
    forms: list[Any] = [files, [Path(file) for file in files], [{"bytes": None, "path": file} for file in files], raw]
    forms += [pictures, [np.array(picture) for picture in pictures]]
    every = [PictureColumn("reference")(form, (10, 12)) for form in forms]
    assert every[0].shape == (2, 3, 10, 12)
    assert every[0].dtype == torch.float32
    for found in every[1:]:
        torch.testing.assert_close(found, every[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(every[0][0], torch.full((3, 10, 12), 128 / 255))


def test_a_turned_picture_is_read_as_it_is_shown(tmp_path: Path) -> None:
    """Files, in every form, as `datasets` decodes them: turned as the camera said."""
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (64, 64), "black")
    halves.paste("white", (0, 0, 64, 32))
    path = tmp_path / "turned.png"
    halves.save(path, exif=exif)
    shown = torch.zeros(3, 64, 64)
    shown[:, :, 32:] = 1
    column = datasets.Dataset.from_dict({"reference": [str(path)]})
    decoded, plain = (column.cast_column("reference", datasets.Image(decode=decode)) for decode in (True, False))
    entries: list[Any] = [str(path), path, {"bytes": path.read_bytes()}, decoded[0]["reference"], plain[0]["reference"]]
    for entry in entries:
        assert torch.equal(PictureColumn("reference")([entry], (64, 64))[0], shown)


def test_the_middle_of_a_picture_that_covers(files: list[str]) -> None:
    """A wide picture is cut at its sides and a tall one above and below, not squeezed; equal sizes are left alone."""
    (square,) = PictureColumn("reference")(files[1:], (20, 20))
    assert square[0, :, :8].min() > 0.95
    assert square[2, :, -8:].min() > 0.95
    (same,) = PictureColumn("reference")(files[1:], torch.Size((20, 40)))
    assert torch.equal(same[0, :, :20], torch.ones(20, 20))
    assert torch.equal(same[2, :, :20], torch.zeros(20, 20))
    Image.open(files[1]).rotate(-90, expand=True).save(files[0])  # red above blue
    (tall,) = PictureColumn("reference")(files[:1], (20, 20))
    assert tall[0, :8].min() > 0.95
    assert tall[2, -8:].min() > 0.95


def test_a_file_is_decoded_once(files: list[str], opened: list[object]) -> None:
    """Per size, for as long as it is among those kept."""
    column = PictureColumn("reference", keep=1)
    for _ in range(2):
        column([files[0]] * 4, (8, 8))
    assert len(opened) == 1
    column([files[1]], (8, 8))
    column([files[0]], (8, 8))
    assert len(opened) == 3
    more = PictureColumn("reference", keep=2)
    for size in (8, 9, 8, 10, 8):  # what was used last is kept, not what was read last
        more(files[:1], (size, size))
    assert len(opened) == 6


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("/no/such/file.png", "row 1: '/no/such/file.png' cannot be read as a picture"),
        (__file__, "cannot be read as a picture: cannot identify"),
        (3, "a picture is a PIL image"),
        ({"bytes": None, "path": None}, "a picture is a PIL image"),
        ({"bytes": b"no picture"}, "cannot be read as a picture"),
        ({"bytes": cut_off()}, "cannot be read as a picture: broken PNG file"),
    ],
)
def test_what_is_no_picture(files: list[str], entry: Any, words: str) -> None:
    """A DataError with the row."""
    with pytest.raises(DataError) as caught:
        PictureColumn("reference")([files[0], entry], (8, 8))
    assert words in str(caught.value)


def test_the_reward_of_the_page_keeps_the_contract() -> None:
    """Its gradient included."""
    results = {result.name: result for result in run_reward_checks(resemblance()())}
    assert {result.status for result in results.values()} == {"passed", "skipped"}
    assert results["ascent_raises_score"].status == "passed"


@pytest.mark.parametrize("kind", ["paths", "decoded", "files"])
def test_in_a_run(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, files: list[str], kind: str, opened: list[object]
) -> None:
    """From paths, from a column of pictures, and from one of files that are not decoded; the last prompt has none."""
    data = datasets.Dataset.from_dict({"prompt": [*PROMPTS, "a two"], "reference": [*files, None]})
    if kind != "paths":
        data = data.cast_column("reference", datasets.Image(decode=kind == "decoded"))
    made = resemblance()()
    trainer = make_trainer(
        tmp_path / "run", ["dm", (made, 0.1)], data, eval_dataset=data, max_steps=2, reward_batch_size=2
    )
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert -1 < row["rewards/resemblance/mean"] < 0
    assert -1 < trainer.evaluate()["eval_rewards/resemblance/mean"] < 0
    if kind != "decoded":
        assert len(opened) == 2


def test_paths_travel_to_a_server_and_pictures_do_not(files: list[str]) -> None:
    """What cannot be sent is refused by name."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = resemblance()()
    with serving([made]) as app:
        far = Remote(url=app.url)
        batch = RewardBatch.from_images(images, columns={"reference": list(files)})
        torch.testing.assert_close(evaluate_reward(far, batch).scores, evaluate_reward(made, batch).scores)
        pictures: list[object] = [Image.new("RGB", (8, 8))] * 2
        with pytest.raises(RewardError, match="needs the column 'reference', which holds Image; only texts"):
            evaluate_reward(far, RewardBatch.from_images(images, columns={"reference": pictures}))
