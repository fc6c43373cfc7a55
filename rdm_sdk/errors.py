"""Every error the SDK raises on purpose; each message says what was wrong, what was got and what to do."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path


class RDMError(Exception):
    """Base of all errors raised by the SDK."""


class ConfigError(RDMError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(RDMError, ValueError):
    """Prompts or columns that cannot be used."""


class ModelError(RDMError, ValueError):
    """A base model that is missing, unsupported or broken."""


class CheckpointError(RDMError):
    """A checkpoint that is corrupted, incomplete or belongs to another run."""


class RewardError(RDMError):
    """A reward that is unknown, misused or returned something unusable."""


def described(error: BaseException) -> str:
    """Return an exception as "Type: message (file.py, line 12)", the place being where it was raised.

    Of long messages, such as those that hold a printed network, the two ends are kept.
    """
    message = str(error).rstrip(". ")
    if len(message) > 600:
        message = f"{message[:200]} [...] {message[-300:]}"
    text = f"{type(error).__name__}: {message}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def shown(value: object, limit: int = 200) -> str:
    """Return `repr(value)` for a message, with its middle left out if it is longer than `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}[...]{text[-limit // 2 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_texts(texts: object, name: str, error_class: type[RDMError]) -> list[str]:
    """Return `texts` as a list, or raise if it is none of texts; a single text is none, though it can be iterated."""
    if isinstance(texts, str):
        raise error_class(f"{name} must be a list of texts; got the single text {shown(texts, 60)}. Write [{name}]")
    if not isinstance(texts, Sequence) or not texts:
        raise error_class(f"{name} must be a list of one or more texts; got {shown(texts, 60)}")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise error_class(f"{name}, row {row}: must be a text; got {shown(text, 60)}")
    return list(texts)
