"""Tiny pipelines that the tests of families share."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_pipelines import TINY_PIPELINES


@pytest.fixture(scope="session")
def pipelines() -> dict[str, Any]:
    """Return a tiny pipeline of every family, by its class's name; tests leave them as they are."""
    made = {name: build() for name, build in TINY_PIPELINES.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made
