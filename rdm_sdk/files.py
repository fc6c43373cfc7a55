"""Paths, as users name them and as files are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def looks_local(source: str) -> bool:
    """Whether a source of weights must be a path: it exists, or no hub id is written like it (`owner/name`)."""
    exists = Path(source).expanduser().exists()
    return exists or source.startswith((".", "/", "~")) or source.count("/") != 1 or "\\" in source


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to; what is written takes the place of `path` once the block is through.

    So no one ever finds half of a file. If the block fails, `path` is as it was, and what was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    try:
        staged.touch()
        usual = staged.stat().st_mode
        yield staged
        if staged.stat().st_mode != usual:  # safetensors makes files that nobody else can read
            staged.chmod(usual)
        staged.replace(path)
    except BaseException:
        with suppress(OSError):  # the error that is told is the one that came first
            staged.unlink(missing_ok=True)
        raise
