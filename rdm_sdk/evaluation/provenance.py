"""Hashes of what was evaluated."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def digest(content: object) -> str:
    """Return a short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def files_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return a short hash of the names and bytes of the files of a folder that match the patterns."""
    hashed = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        hashed.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()[:24]
