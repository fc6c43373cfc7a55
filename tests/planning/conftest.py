"""Tiny pipelines on disk, whole and as configs alone."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from planned_runs import SMALL
from tiny_pipelines import TINY_PIPELINES, tiny_sd3


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every family's tiny pipeline, and in `configs` the same without weights and tokenizers.

    `SMALL` is a Stable Diffusion 3 of one block: plans take time by the block.
    """
    root = tmp_path_factory.mktemp("tiny")
    for name, make in (TINY_PIPELINES | {SMALL: partial(tiny_sd3, num_layers=1)}).items():
        make().save_pretrained(root / name)
        for file in (root / name).rglob("*config.json"):
            if file.parent != root / name and "tokenizer" not in file.name:
                target = root / "configs" / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        shutil.copy(root / name / "model_index.json", root / "configs" / name)
    assert not list((root / "configs").rglob("*.safetensors"))
    return root
