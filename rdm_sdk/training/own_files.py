"""Which files of an output folder a run may replace: those that stand as this SDK wrote them.

`run.yaml` ends in a line with a hash of itself and one of `prompts.jsonl` beside it. What was changed since, or never
was the SDK's, is somebody's own and stays: the run's files then get a number.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from pathlib import Path

from rdm_sdk.files import sha256_of

logger = logging.getLogger(__name__)

FILE, PROMPTS = "run.yaml", "prompts.jsonl"
NO_PROMPTS = "none"
"""In the place of the hash, where there is no file of prompts."""
_SEAL = "# rdm-sdk replaces this file and its prompts unless they were changed: SHA-256 "


def places(folder: Path) -> tuple[Path, Path]:
    """Return where a run's settings and prompts go: the usual names, or others where those are somebody's own.

    In that case a line in the log says so.
    """
    usual = folder / FILE, folder / PROMPTS
    for number in itertools.count(1):
        pair = usual if number == 1 else tuple(path.with_stem(f"{path.stem}-{number}") for path in usual)
        if _replaceable(*pair):
            break
    settings, prompts = pair
    if number > 1:
        logger.warning(
            f"{FILE} or {PROMPTS} in {str(folder)!r} is not as this SDK wrote it, so both stay; the settings of this "
            f"run are in {str(settings)!r}"
        )
    return settings, prompts


def sealed(text: str, prompts: str) -> str:
    """Return the content of a file of settings, all whole lines, with one that tells whether it was changed.

    `prompts` is the hash of the file of prompts, or `NO_PROMPTS`.
    """
    return f"{text}{_SEAL}{_hash(text)} and {prompts}\n"


def _replaceable(settings: Path, prompts: Path) -> bool:
    """Return whether both files are missing or as this SDK wrote them."""
    stated = _prompts_of(settings)
    if os.path.lexists(settings) and stated is None:
        return False
    return not os.path.lexists(prompts) or (stated is not None and _hash_of(prompts) == stated)


def _prompts_of(settings: Path) -> str | None:
    """Return the hash of prompts that a file of settings states, None unless the file is as this SDK wrote it."""
    try:
        text, _, last = settings.read_text(encoding="utf-8").rpartition(_SEAL)
    except (OSError, ValueError):  # there is none, it is a folder, or no text
        return None
    match = re.fullmatch(r"(\w+) and (\w+)\n", last)
    return match[2] if match and match[1] == _hash(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of(path: Path) -> str | None:
    """Return the hash of a file's bytes, None where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None
