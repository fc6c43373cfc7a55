"""Pictures for people: labels that can be read, in the words of the pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_sdk.training.finished import look
from rdm_sdk.training.pictures import image_grid


@pytest.mark.parametrize("height", [64, 128])
def test_labels_grow_with_the_rows(height: int, tmp_path: Path) -> None:
    """A capital letter is at least a sixth of a row high, so that a grid scaled down to a phone can be read."""
    path = image_grid([("H", torch.ones(1, 3, height, height))], tmp_path / "grid.png")
    dark = np.asarray(Image.open(path).convert("L")) < 128
    assert dark.any(axis=1).sum() >= height / 6


def test_the_rows_of_a_run_are_called_as_in_the_pages(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Student, teacher and critic; the last two see the student's pictures with noise on them."""
    trainer = make_trainer(tmp_path, "dm")
    rows = look(trainer.models, trainer.judge, ["a handwritten seven"])
    after = "after\nnoise of 0.6"
    assert [label for label, _ in rows] == ["student", f"teacher, {after}", f"critic, {after}"]
