"""Pictures that a reward scores too low are not shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_sdk import ConfigError, RDMTrainer, RewardError
from rdm_sdk.training.picture_filter import GRAY, PictureFilter

Make = Callable[..., RDMTrainer]


def light(images: Tensor, prompts: list[str]) -> list[float | None]:
    """How light a picture is; for nothing that is asked for in the dark."""
    means = images.mean(dim=(1, 2, 3)).tolist()
    return [None if prompt == "dark" else mean for mean, prompt in zip(means, prompts, strict=True)]


PLACE = f"{__name__}:light"


def test_lower_scores_are_gray() -> None:
    """A score at the bound is shown; what has none is not."""
    levels = torch.tensor([0.25, 0.75, 1.0, 1.0])
    images = levels[:, None, None, None].expand(4, 3, 8, 8)
    shown = PictureFilter(f"{PLACE} >= 0.75")(images, ["a", "b", "c", "dark"])
    assert shown[:, 0, 0, 0].tolist() == [GRAY, 0.75, 1.0, GRAY]
    assert torch.equal(shown[1:3], images[1:3])


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("safety", ConfigError, "must be a reward and its least score, such as 'safety >= 0.9'; got 'safety'"),
        (">= 0.9", ConfigError, "must be a reward"),
        ("jpeg >= nan", ConfigError, "must be a reward"),
        ("jpeg > 0.5", ConfigError, "must be a reward"),
        ("jpeg + legibility >= 0", ConfigError, "one reward that scores each picture by itself"),
        ("dm >= 0", ConfigError, "needs the models of a training run"),
        ("jpg >= 0", RewardError, "unknown reward 'jpg'"),
    ],
)
def test_what_is_no_filter_is_refused(text: str, error: type[Exception], words: str) -> None:
    """In words that say what to write."""
    with pytest.raises(error) as caught:
        PictureFilter(text)
    assert words in str(caught.value)


def test_a_runs_grid_is_filtered(make_trainer: Make, tmp_path: Path) -> None:
    """Every row: with a bound that nothing reaches, all pictures are gray; with one that all reach, none is."""
    grids = []
    for name, bound in (("none", 2), ("all", -1)):
        trainer = make_trainer(tmp_path / name, log_images=1, max_steps=1, log_images_filter=f"{PLACE} >= {bound}")
        trainer.train()
        (path,) = (tmp_path / name / "images").iterdir()
        grids.append(np.asarray(Image.open(path).convert("L"))[:, -30:-10])
    hidden, shown = grids
    assert ((hidden == 255) | (abs(hidden.astype(int) - 127) <= 1)).all()
    assert hidden.std() < shown.std()


def test_it_is_looked_at_before_the_base_is_loaded(make_trainer: Make, tmp_path: Path) -> None:
    """A name that is misspelt ends the run at once."""
    with pytest.raises(RewardError, match="unknown reward 'safty'"):
        make_trainer(tmp_path, log_images=1, log_images_filter="safty >= 0.9")
