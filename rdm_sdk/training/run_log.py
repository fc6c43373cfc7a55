"""The log of a run, a line per log in `log.jsonl`: whole beside the checkpoints, of which each keeps the end alone.

A checkpoint would otherwise hold all that was ever logged, again and again. The logs that it keeps are looked up in the
file when the run goes on from it: what stands behind them is of steps that are taken once more.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState

from rdm_sdk.errors import CheckpointError
from rdm_sdk.files import replacing
from rdm_sdk.training.watch_rules import LEVELS

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
KEPT = LEVELS
"""Logs that a checkpoint keeps: what the watch can still make a past of where the file is lost."""

History = list[dict[str, Any]]


def read_log(path: Path) -> list[str]:
    """Return the whole lines of a log, none where there is no file; half a line of a killed run is left out."""
    # Bytes that are no text are somebody else's, or damage, which the lines' readers tell.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []


def check_own(path: Path) -> None:
    """Raise `CheckpointError` for a file of a log's name that no run has written: a run would replace it."""
    lines = read_log(path)
    if lines and not any(map(_is_log, lines)):
        raise CheckpointError(
            f"{str(path)!r} is no log of a run, and a run here would replace it; move it, or choose another output_dir"
        )


def _is_log(line: str) -> bool:
    try:
        return bool(parsed([line]))
    except ValueError:
        return False


def parsed(lines: Sequence[str]) -> History:
    """Return the figures of lines, a mapping each.

    Raises:
        ValueError: one is damaged, or holds something else.
    """
    history = [json.loads(line) for line in lines]
    for number, figures in enumerate(history, 1):
        if not isinstance(figures, dict) or "step" not in figures:
            raise ValueError(f"line {number} is no log of a run")
    return history


def whole_history(kept: History, path: Path) -> History:
    """Return all that a run had logged when a checkpoint of it was written, of which that has `kept` the end.

    Where the run's log does not have it, a warning tells so, and `kept` is returned.
    """
    if len(kept) != KEPT:  # all there were; or more, of a version that kept all
        return kept
    lines, last = read_log(path), _lines(kept)
    for end in range(len(lines), KEPT - 1, -1):
        if lines[end - KEPT : end] == last:
            try:
                return parsed(lines[:end])
            except ValueError:
                break
    logger.warning(
        f"{str(path)!r} does not hold what was logged up to step {kept[-1]['step']}: of that, the watch and reports "
        f"know the last {KEPT} logs, which the checkpoint keeps"
    )
    return kept


def _lines(history: Sequence[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in history]


class LogFile:
    """Writes the log of a run; nothing before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False
        self._rows = self._bytes = 0

    def begin(self, history: History) -> None:
        """Put what was logged so far in the place of what the file holds."""
        if history:
            with replacing(self.path) as staged:  # on a full disk, the file stays as it is
                staged.write_text("".join(f"{line}\n" for line in _lines(history)), encoding="utf-8")
        else:
            self.path.unlink(missing_ok=True)
        self._begun, self._rows = True, len(history)
        self._bytes = self.path.stat().st_size if history else 0

    def append(self, history: History, wait: bool = False) -> None:
        """Write what is new in a history; `wait` until it is on the disk.

        Raises:
            OSError: it could not be written, and is tried again the next time.
        """
        if not self._begun:
            return
        if self._rows and (not self.path.is_file() or self.path.stat().st_size < self._bytes):
            self.begin(history)  # someone has removed it
        new = "".join(f"{line}\n" for line in _lines(history[self._rows :])).encode()
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._bytes)  # of lines that did not fit on the disk, a part may have
                file.write(new)
                file.flush()
                if wait:
                    os.fsync(file.fileno())
            self._rows, self._bytes = len(history), self._bytes + len(new)

    @contextmanager
    def shortened(self, state: TrainerState) -> Iterator[None]:
        """Let a block save Trainer's state with the last logs alone, once the file has all.

        Raises:
            OSError: it could not be written.
        """
        self.append(state.log_history, wait=True)
        whole, state.log_history = state.log_history, state.log_history[-KEPT:]
        try:
            yield
        finally:
            state.log_history = whole
