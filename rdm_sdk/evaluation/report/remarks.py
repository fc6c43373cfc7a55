"""What a run's logs say about whether it went well: sentences, from rules that can be read here.

The watch (`training/watch_rules.py`) has judged matching, variety and held-out rewards while the run went on; what is
told here beside its findings are the figures that it does not look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rdm_sdk.evaluation.report.curves import Curve
from rdm_sdk.training.watch import FINDING

LATE = 0.25
"""The part of a run that is its end."""
LEARNED = 1e-3
"""The share of a critic's error that the gap is at least, if the critic has learned anything. In four runs of
the digits that learn it is from 0.06 to 20, with a fortieth of the critic's rate 0.02, with a four thousandth 3e-6."""


def told(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the watch has said while the run went on, in order."""
    return [f"The watch at step {row['step']}: {row[FINDING]}" for row in history if FINDING in row]


def remarks(curves: Sequence[Curve], run: int) -> list[str]:
    """Return what to look at in a run, most serious first; empty where no rule finds anything."""
    found = []
    for curve in curves:
        points = curve.points[run]
        if curve.broken and not points:
            found.append(f"{curve.name} was NaN or infinite: the run has diverged. Lower the learning rates.")
        elif len(points) >= 8:
            found += _of(curve.name, [value for _, value in points])
    return found + _idle(curves, run)


def _of(name: str, values: list[float]) -> list[str]:
    end, least = _end(values), min(_smoothed(values))
    if name == "grad_norm" and least > 0 and end > 20 * least:
        return [f"{name} ended at {end / least:.0f} times its lowest: the run may diverge. Lower learning_rate."]
    if name == "frac_reward_zero_std" and end > 0.5:
        return [f"{name} ended at {end:.2f}: in most groups all samples score alike, and advantages are empty."]
    if name == "ratio/ess" and end < 0.5:
        return [f"{name} ended at {end:.2f}: rollouts are used too often. Lower num_iterations."]
    return []


def _idle(curves: Sequence[Curve], run: int) -> list[str]:
    """Return a remark for each critic that has stayed what it began as: the teacher."""
    found = []
    values = {curve.name: [value for _, value in curve.points[run]] for curve in curves}
    for name, gaps in values.items():
        reward, _, figure = name.rpartition("/")
        errors = values.get(f"{reward}/error", [])
        if figure == "gap" and min(len(gaps), len(errors)) >= 8 and _end(gaps) < LEARNED * _end(errors):
            found.append(
                f"{name} ended at {_end(gaps):.1g}, next to nothing: the critic still equals the teacher, so "
                f"{reward!r} has no direction. Raise critic_learning_rate."
            )
    return found


def _end(values: Sequence[float]) -> float:
    late = values[-max(1, int(LATE * len(values))) :]
    return sum(late) / len(late)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return means over windows of an eighth, so that a single low value is not taken for the level."""
    width = max(1, math.ceil(len(values) / 8))
    return [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1)]
