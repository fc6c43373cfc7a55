"""Tiny pipelines on disk, whole and as configs alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_pipelines import TINY_PIPELINES


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every family's tiny pipeline, and in `configs` the same without weights and tokenizers."""
    root = tmp_path_factory.mktemp("tiny")
    for name, make in TINY_PIPELINES.items():
        make().save_pretrained(root / name)
        for file in (root / name).rglob("*config.json"):
            if file.parent != root / name and "tokenizer" not in file.name:
                target = root / "configs" / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        shutil.copy(root / name / "model_index.json", root / "configs" / name)
    assert not list((root / "configs").rglob("*.safetensors"))
    return root
