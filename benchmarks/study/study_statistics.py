"""The study's raw rows by cell, and how two cells compare. For its page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from intervals import Estimate, estimate, ratio

Row = dict[str, Any]


class Results:
    """The raw rows, by cell."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[str, list[Row]] = {}
        for row in rows:
            self.rows.setdefault(row["cell"], []).append(row)
        # One seed says nothing: such cells are for the next call of `study.py run` to finish.
        self.rows = {cell: own for cell, own in self.rows.items() if len(own) > 1}

    def counted(self) -> Results:
        """Return the rows whose illegible samples were counted among more, with legibility as these say."""
        return Results(
            row | {"legibility": 1 - row["illegibility"]}
            for own in self.rows.values()
            for row in own
            if "illegibility" in row
        )

    def has(self, cell: str) -> bool:
        return cell in self.rows

    def of(self, cell: str, figure: str | Callable[[Row], float]) -> Estimate:
        """Return the estimate of a figure: its name, or a function of the row."""
        read = figure if callable(figure) else lambda row: float(row[figure])
        return estimate([read(row) for row in self.rows[cell]])

    def cost(self, cell: str, name: str) -> float:
        return statistics.mean(float(row["costs"].get(f"cost/{name}", 0)) for row in self.rows[cell])

    def total_forwards(self, cell: str) -> float:
        """Return all network evaluations of a run, in samples: student, critic and teacher."""
        return sum(self.cost(cell, f"{role}_forwards") for role in ("student", "fake", "teacher"))


def compare(results: Results, better: str, worse: str, figure: str = "FID-SD") -> str:
    """Return a sentence that compares two cells, with no opinion; pairs are runs of one seed, so of the same noise."""
    a, b = results.of(better, figure), results.of(worse, figure)
    apart = "intervals apart" if a.high < b.low or b.high < a.low else "intervals overlap"
    ours, theirs = ({row["seed"]: row[figure] for row in results.rows[cell]} for cell in (better, worse))
    paired = ratio([math.log(ours[seed] / theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])
    return (
        f"{better}: {a}; {worse}: {b}; ratio of means {a.mean / b.mean:.3f} ({apart}, {a.count} and {b.count} seeds); "
        f"paired by seed {paired}"
    )
