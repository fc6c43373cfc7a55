"""Checkpoints that were damaged before their manifest was written, so that it does not tell."""

from __future__ import annotations

import json
from pathlib import Path

from rdm_sdk.training import checkpoint_folders


def seal(checkpoint: Path, step: int = 1) -> None:
    """Write a checkpoint's manifest anew, as if it had been written as it is now."""
    before = json.loads((checkpoint / checkpoint_folders.MANIFEST).read_text())
    (checkpoint / checkpoint_folders.MANIFEST).unlink()
    checkpoint_folders._seal(checkpoint, before["run"], step, before["written"])
