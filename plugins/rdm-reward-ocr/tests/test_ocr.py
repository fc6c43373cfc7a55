"""The reward on PaddleOCR's published weights and pictures of words."""

import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from rdm_reward_ocr import reader as module
from rdm_reward_ocr.reader import Reader
from rdm_reward_ocr.reward import TextInPicture

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.serving.local import served
from rdm_sdk.testing import parametrize_reward_checks

BLACK, WHITE, NAVY, CREAM, RED, GREEN = (0,) * 3, (255,) * 3, (10, 20, 90), (245, 235, 200), (200, 20, 30), (40, 90, 60)
LOOKS = {
    "small": ("DejaVuSans", 16, BLACK, WHITE, (128, 128)),
    "large": ("DejaVuSans", 56, NAVY, CREAM, (320, 128)),
    "white on red": ("DejaVuSans-Bold", 32, WHITE, RED, (256, 256)),
    "serif on green": ("DejaVuSerif", 40, CREAM, GREEN, (512, 384)),
    "typewriter": ("DejaVuSansMono", 28, RED, WHITE, (200, 90)),
}


def picture(text, look="white on red"):
    """A picture of a text, RGB in [0, 1], `[3, H, W]`."""
    font, size, ink, paper, canvas = LOOKS[look]
    image = Image.new("RGB", canvas, paper)
    path = Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    draw, middle = ImageDraw.Draw(image), (canvas[0] / 2, canvas[1] / 2)
    draw.text(middle, text, ink, ImageFont.truetype(str(path), size), anchor="mm", align="center")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def batch(texts, prompts, columns=None):
    return RewardBatch.from_images(torch.stack([picture(text) for text in texts]), prompts, 1, columns)


@pytest.fixture(scope="module")
def ocr():
    return TextInPicture()


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(("word", "wrong"), [("HELLO", "BRICK"), ("Bakery", "Summit"), ("1984", "2607")])
def test_right_and_wrong_words(ocr, look, word, wrong):
    """A word that is there scores 1 or nearly so, another one next to nothing, whatever it looks like."""
    images = picture(word, look).expand(2, -1, -1, -1)
    right, other = ocr.score(RewardBatch.from_images(images, [f'a sign "{word}"', f"a sign “{wrong}”"]))
    assert right >= 0.9
    assert other <= 0.3


def test_a_letter_off(ocr):
    """Scores fall with every letter that is off, and with letters too many."""
    asked = ['a sign "market"'] * 4
    scores = ocr.score(batch(["market", "markes", "mondes", "market hall"], asked)).tolist()
    assert scores == pytest.approx([1, 5 / 6, 2 / 6, 6 / 10])


def test_lines_and_several_quotes(ocr):
    """Lines are read from top to bottom, and quoted parts are asked for in their order."""
    prompts = ['"fresh bread"', "'fresh' above 'bread'", "'bread' above 'fresh'"]
    both, parts, swapped = ocr.score(batch(["fresh\nbread"] * 3, prompts)).tolist()
    assert both == parts == 1
    assert swapped < 0.5


def test_no_text_asked_for(ocr):
    """Without text to show the reward does not apply; a picture without text scores 0 where some is asked for."""
    prompts = ["a fox", "the dogs' house", '"fox"']
    blank = RewardBatch.from_images(torch.full((3, 3, 64, 64), 0.5), prompts)
    assert ocr.score(blank).tolist() == pytest.approx([torch.nan, torch.nan, 0], nan_ok=True)
    assert ocr.applies(prompts, {}) == [False, False, True]
    scored = score_images("ocr", blank.images[:2], prompts[:2])
    assert scored.outputs["ocr"].scores.isnan().all()
    assert scored.shown == {"ocr": 0}


def test_column_goes_before_quotes(ocr):
    """Where the dataset has the column, it decides: its text, or none, whatever is quoted in the prompt."""
    columns = {"text": ["hello", None, " "]}
    scores = ocr.score(batch(["hello"] * 3, ['a sign "brick"', 'a sign "hello"', '"hello"'], columns)).tolist()
    assert scores == pytest.approx([1, torch.nan, torch.nan], nan_ok=True)
    assert (ocr.capabilities.columns, ocr.capabilities.reads) == ((), ("text",))
    named = TextInPicture(column="words")
    assert (named.capabilities.columns, named.capabilities.reads) == (("words",), ())
    assert named.score(batch(["hello"], ["a sign"], {"words": ["hello"], "text": ["brick"]})).tolist() == [1]
    with pytest.raises(RewardError, match=r"needs a column 'words'"):
        score_images("ocr[column=words]", picture("hello")[None], ["a sign"])
    with pytest.raises(RewardError, match=r"column 'text' must hold texts, or None.*got 1984"):
        ocr.score(batch(["1984"], ["a sign"], {"text": [1984]}))


def test_behind_a_server(ocr):
    """The column goes there where the data has it, and a batch that asks for no text is none of its business."""
    images = torch.stack([picture("hello"), picture("brick")])
    with served([ocr]) as url:
        for prompts, columns in (
            (["a sign"] * 2, {"text": ["hello", None]}),
            (['"hello"'] * 2, None),
            (["a"] * 2, None),
        ):
            here, there = (
                score_images(reward, images, prompts, columns=columns) for reward in (ocr, f'remote[url="{url}"]')
            )
            assert there.shown["remote"] == here.shown["ocr"]
            assert torch.equal(there.outputs["remote"].scores.nan_to_num(-1), here.outputs["ocr"].scores.nan_to_num(-1))
    assert there.shown["remote"] == 0


def test_threads_change_nothing(ocr):
    """Several pictures at a time are read as one after the other, and kept in order."""
    words = ["north", "east", "south", "west", "up", "down"]
    given = batch(words, [f'"{word}"' for word in words])
    assert TextInPicture(threads=3).score(given).tolist() == ocr.score(given).tolist() == [1] * 6
    with pytest.raises(RewardError, match=r"ocr.*threads"):
        TextInPicture(threads=0)


def test_nothing_is_downloaded(monkeypatch, tmp_path, ocr):
    """Models come from the wheel: without a network all works, and a missing one is an error, no download."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Reader(1).read(np.full((1, 40, 40, 3), 255, np.uint8)) == [""]
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(RewardError, match=r"has no PP-OCRv6_det_small.onnx.*rapidocr==3.10"):
        Reader(1)
    for name in (module.DETECTION, module.RECOGNITION):
        (tmp_path / "models" / name).write_bytes(b"no model")
    with pytest.raises(RewardError, match=r"models of rapidocr cannot be loaded.*force-reinstall"):
        Reader(1)


def test_quiet(capfd, ocr):
    """Pictures without text, of which a training run makes many, are not written about."""
    ocr.score(RewardBatch.from_images(torch.full((1, 3, 64, 64), 0.5), ['"fox"']))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("RapidOCR").level >= logging.ERROR


def test_provenance():
    """Scores say which models and which version read them."""
    result = score_images("ocr", picture("hello")[None], ['"hello"'])
    assert "PP-OCRv6 small, rapidocr 3." in result.provenance["ocr"]["preprocessing"]


@parametrize_reward_checks(TextInPicture)
def test_contract(check):
    """The reward keeps the SDK's contract."""
    check()


def test_contract_with_a_column():
    """So does one that is given a column: its example has it."""
    assert "words" in TextInPicture(column="words").example().columns
