"""What a run left in its output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.result import FILE as EVALUATION
from rdm_sdk.training.checkpoint import STATE
from rdm_sdk.training.checkpoint_folders import newest_whole, step_of
from rdm_sdk.training.pictures import logged_pictures
from rdm_sdk.training.run_log import LOG, parsed, read_log, whole_history
from rdm_sdk.training.run_record import RECORD

STATES = "trainer_state.json"


@dataclass(frozen=True)
class Evaluated:
    """What `rdm-sdk eval` wrote into a folder."""

    folder: Path
    content: dict[str, Any]
    picture: Path | None


@dataclass(frozen=True)
class RunLog:
    """One run, as its folder tells."""

    folder: Path
    """As it was given."""
    history: list[dict[str, Any]]
    """What was logged, one mapping per log, each with its `step`."""
    step: int
    """The last optimizer step."""
    max_steps: int
    record: dict[str, Any]
    """base, rewards, settings and versions, as far as they are known."""
    pictures: list[tuple[int, Path]]
    """What `log_images` wrote, by step."""
    evaluations: list[Evaluated]
    """Those in its folder, and in folders in it."""


def read_run(folder: str | Path) -> RunLog:
    """Return what a run left: in its output folder, in a checkpoint, or in a folder of `rdm-sdk demo`.

    Raises:
        DataError: there is no log, or a file of it is damaged.
    """
    given = Path(folder)
    if not given.is_dir():
        raise DataError(f"there is no folder {str(given)!r}; give the output_dir of a run")
    path = given / "training" if not _is_run(given) and (given / "training").is_dir() else given
    if not _is_run(path):
        raise DataError(
            f"{str(given)!r} holds no log of a run: {LOG} is written from the first log on (logging_steps). Give the "
            "output_dir of a run that has come so far"
        )
    above = path.parent if step_of(path) >= 0 else path
    states = {place: _read(place) for place in _states(path)}
    newest = max(states, key=lambda place: states[place].get("global_step", 0), default=path / STATES)
    state = states.get(newest, {})
    history = _history(path, above / LOG, state)
    if not history:
        raise DataError(f"{str(path)!r} has no logs in it; was logging_steps larger than the run?")
    record = _record(above, newest.parent)
    return RunLog(
        given,
        history,
        max(int(state.get("global_step", 0)), int(history[-1]["step"])),
        int(state.get("max_steps", 0)) or max(0, int(record.get("settings", {}).get("max_steps", 0))),
        record,
        logged_pictures(above / "images"),
        _evaluations(above, given),
    )


def _is_run(folder: Path) -> bool:
    return (folder / LOG).is_file() or bool(_states(folder))


def _states(folder: Path) -> list[Path]:
    """Return Trainer's states of a run: the folder's, and that of its newest whole checkpoint."""
    newest, _ = newest_whole(folder)
    return [place / STATES for place in (folder, newest) if place is not None and (place / STATES).is_file()]


def _history(folder: Path, log: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was logged: all that the file has, or until a checkpoint was written if the folder is one.

    Raises:
        DataError: the file is damaged.
    """
    kept = [row for row in state.get("log_history", []) if isinstance(row, dict) and "step" in row]
    if log.parent != folder:
        return whole_history(kept, log)
    try:
        return parsed(read_log(log)) or kept
    except ValueError as error:
        raise DataError(f"{str(log)!r} cannot be read: {error}") from error


def _evaluations(*folders: Path) -> list[Evaluated]:
    """Return the evaluations in folders, and in folders in them, each once."""
    places = [path for folder in folders for path in (folder / EVALUATION, *sorted(folder.glob(f"*/{EVALUATION}")))]
    found = [path for path in dict.fromkeys(places) if path.is_file()]
    grids = [path.with_name("grid.png") for path in found]
    return [
        Evaluated(path.parent, _read(path), grid if grid.is_file() else None)
        for path, grid in zip(found, grids, strict=True)
    ]


def _record(folder: Path, newest: Path) -> dict[str, Any]:
    """Return a run's settings: of `run.json`, else of a checkpoint, which knows no versions."""
    if (folder / RECORD).is_file():
        return _read(folder / RECORD)
    if not (newest / STATE).is_file():
        return {}
    state = _read(newest / STATE)
    weights = state.get("weights", {})
    rewards = [
        {"reward": name, "weight": weights.get(name), "route": route}
        for name, route in zip(state.get("rewards", []), state.get("routes", []), strict=False)
    ]
    return {"settings": state.get("identity", {}).get("settings", {}), "rewards": rewards}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(path)!r} must hold a JSON object")
    return content
