"""What an evaluation found: rows of figures, with all that they must be kept with; as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdm_sdk.files import replacing
from rdm_sdk.training.pictures import markdown_table

FILE = "eval.json"
"""What `rdm-sdk report` looks for."""
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """The figures of one candidate."""

    name: str
    steps: int
    student: str | None
    """The student's folder; None for the teacher."""
    against: dict[str, dict[str, Any]]
    """By reference ("teacher", "real"): frechet with low and high, kernel with its deviation, precision, recall,
    density, coverage."""
    diversity: float | None
    """None where each prompt has one image."""
    rewards: dict[str, dict[str, Any]]
    """By reward: mean, low and high (None where it compares within groups, or has one score), deviation, images, and
    the best and worst prompts."""
    worth: str
    """How many steps of the teacher it is worth; empty for the teacher, and without rows of the teacher."""
    milliseconds: float | None
    """Per image; None where images came from the cache."""


@dataclass(frozen=True)
class EvaluationResult:
    """Students and teachers beside each other."""

    rows: list[Row]
    provenance: dict[str, Any]
    """Versions, base, prompts, seeds, counts, features, rewards, guidance, calls."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def table(self) -> str:
        """Return a Markdown table; figures with 95 % intervals where there are any."""
        header, *rows = self.cells()
        return markdown_table(header, rows)

    def cells(self) -> list[list[str]]:
        """Return the table's header and its rows."""
        rewards = list(dict.fromkeys(name for row in self.rows for name in row.rewards))
        real = any("real" in row.against for row in self.rows)
        names = ["", "FID-SD", "worth teacher steps", "KID-SD", *(["FID", "KID"] if real else [])]
        header = [*names, "precision", "recall", "density", "coverage", "diversity", *rewards, "ms / image"]
        cells = [
            [row.name, *_cells(row, real), *_rewards(row, rewards), _number(row.milliseconds)] for row in self.rows
        ]
        filled = [i for i in range(len(header)) if i == 0 or any(row[i] for row in cells)]
        return [[row[i] for i in filled] for row in (header, *cells)]

    def to_json(self) -> str:
        """Return everything as JSON."""
        content = {"format": FORMAT, "rows": [vars(row) for row in self.rows]}
        return json.dumps(content | {"notes": self.notes, "provenance": self.provenance}, indent=1)

    def save(self, folder: str | Path) -> Path:
        """Write `eval.json` and `table.md` into a folder; return the path of the first."""
        path = Path(folder) / FILE
        for target, text in ((path, self.to_json()), (path.with_name("table.md"), self.table())):
            with replacing(target) as staged:
                staged.write_text(text + "\n", encoding="utf-8")
        return path


def _cells(row: Row, real: bool) -> list[str]:
    teacher, scans = row.against.get("teacher", {}), row.against.get("real", {})
    shape = scans if real else teacher
    shares = [_number(shape.get(name)) for name in ("precision", "recall", "density", "coverage")]
    reals = [_frechet(scans), _kernel(scans)] if real else []
    return [_frechet(teacher), row.worth, _kernel(teacher), *reals, *shares, _number(row.diversity)]


def _rewards(row: Row, names: list[str]) -> list[str]:
    return [_between(row.rewards[name], "mean") if name in row.rewards else "" for name in names]


def _frechet(figures: Mapping[str, Any]) -> str:
    return _between(figures, "frechet") if "frechet" in figures else ""


def _kernel(figures: Mapping[str, Any]) -> str:
    if "kernel" not in figures:
        return ""
    return f"{_number(figures['kernel'])} ± {_number(figures['kernel_deviation'])}"


def _between(figures: Mapping[str, Any], name: str) -> str:
    """Return a figure with its interval, if there is one, such as "8.72 (8.1 to 9.3)"."""
    if figures["low"] is None:
        return _number(figures[name])
    return f"{_number(figures[name])} ({_number(figures['low'])} to {_number(figures['high'])})"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
