"""Whether a run goes wrong, as its logs tell: pure functions of what was logged so far, and sentences for people.

Nothing here is tuned to a model: a figure is compared with the run itself, in units that it brings along.

- A log is noisy, so figures are looked at in **levels**: medians of up to 50 stretches of the run, which are single
  logs at first. *Now* are the last five levels, and each of them must be beyond the bound: a finding has lasted for a
  tenth of the run, and for five logs at least.
- Its **best** is the best median of seven levels before: three spikes among them make no best.
- The bound is as far from the best as **matters** (below), and at least three times the figure's noise, the robust
  deviation of one level from the next.

What matters: a reward that falls (or rises) by one standard deviation of its samples, which is Cohen's d = 1 and a
large effect whatever the reward's unit; variety that falls to half; a mismatch with the teacher that grows to four
times its least (twice as far away) and is most of the distance from the teacher. The critic's lag needs no past: the
square of the error that it makes for all samples of a prompt alike, on average over 20 levels and beyond three standard
errors, is more than half of the mismatch that the critic tells the student.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

LEVELS = 50
"""Into how many levels a run is divided, at most twice as finely as it is short of logs."""
LASTING = 5
"""Levels that a finding must last for; there must be as many before."""
REMEMBERED = 7
"""Levels that a best is the median of, where there are so many before now."""
NOISES = 3.0
"""A change below so many deviations of a level from the next is no change."""
LEFT = 0.5
"""Variety below this share of its best is a collapse."""
FARTHER = 4.0
"""A mismatch of so many times its least is drift: a square, so the student is twice as far away."""
KNOWN = 20
"""Levels whose mean tells the critic's lag: it is drowned in noise, but fresh noise around what is 0 without a lag."""
MOSTLY = 0.5
"""A share that is more than the rest."""


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong in a run."""

    kind: str
    """"hack", "collapse", "drift", "critic" or "held-out"."""
    figure: str
    """The name of the figure that shows it."""
    text: str
    """In plain words: what, since when, and what to do."""


@dataclass(frozen=True)
class Course:
    """A figure over the steps of a run, as far as it has come; NaN and infinity are left out."""

    steps: np.ndarray
    """The steps that levels end at, `[L]`."""
    levels: np.ndarray
    """`[L]`."""

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> Course:
        """Return the course of logged values, (step, value) each."""
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        width = max(1, math.ceil(len(finite) / LEVELS))
        ends = range(len(finite), 0, -width)  # counted from now, so that the newest level is a whole one
        parts = [finite[max(0, end - width) : end] for end in reversed(ends)]
        levels = [float(np.median([value for _, value in part])) for part in parts]
        return cls(np.array([part[-1][0] for part in parts]), np.array(levels))

    @cached_property
    def noise(self) -> float:
        """The robust standard deviation of a level, from the differences of neighbors."""
        differences = np.diff(self.levels)
        return float(1.4826 * np.median(np.abs(differences - np.median(differences))) / math.sqrt(2))

    @cached_property
    def now(self) -> np.ndarray:
        """The levels that a finding must hold for."""
        return self.levels[-LASTING:]

    @cached_property
    def before(self) -> np.ndarray:
        """Medians of `REMEMBERED` levels in a row, all that end before now."""
        windows = np.lib.stride_tricks.sliding_window_view(self.levels[:-LASTING], self.remembered)
        return np.asarray(np.median(windows, axis=1))

    @property
    def remembered(self) -> int:
        """How many levels each of `before` is the median of."""
        return min(REMEMBERED, len(self.levels) - LASTING)

    def best(self, lowest: bool = False) -> tuple[int, float]:
        """Return the highest level before now, or the lowest, and the step it was left at."""
        at = int(self.before.argmin() if lowest else self.before.argmax())
        return int(self.steps[at + self.remembered - 1]), float(self.before[at])

    @property
    def latest(self) -> float:
        """The level of now."""
        return float(np.median(self.now))


class _Run:
    """The courses of a run's figures."""

    def __init__(
        self, history: Sequence[Mapping[str, Any]], trained: Collection[str], held_out: Collection[str]
    ) -> None:
        self.trained, self.held_out = trained, held_out
        self._points: dict[str, list[tuple[int, float]]] = {}
        for row in history:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self._points.setdefault(name, []).append((int(row["step"]), float(value)))

    def course(self, name: str) -> Course | None:
        """Return the course of a figure; None where there is too little of it."""
        found = Course.of(self._points.get(name, []))
        return found if len(found.levels) >= 2 * LASTING else None

    def names(self, pattern: str) -> list[tuple[str, str]]:
        """Return the figures whose whole name matches, each with the part in parentheses."""
        return [(name, match[1]) for name in self._points if (match := re.fullmatch(pattern, name))]

    def unit(self, figure: str, course: Course, step: int) -> float:
        """Return the standard deviation of a reward's samples, pooled over what it was at a step and is now."""
        spread = self.course(figure.removesuffix("/mean") + "/std")
        if spread is None:
            return 0.0
        then = float(spread.levels[int(np.abs(spread.steps - step).argmin())])
        return math.sqrt((then**2 + float(np.median(spread.now)) ** 2) / 2)

    @cached_property
    def risen(self) -> list[str]:
        """Return, in words, which of the trained rewards have risen since the beginning."""
        found = []
        for name in self.trained:
            figure = f"rewards/{name}/mean"
            course = self.course(figure)
            if course is None:
                continue
            step, first = int(course.steps[course.remembered - 1]), float(course.before[0])
            if course.now.min() > first + max(self.unit(figure, course, step), NOISES * course.noise):
                found.append(f"{name!r} rose from {first:.3g} to {course.latest:.3g}")
        return found


def findings(
    history: Sequence[Mapping[str, Any]],
    trained: Collection[str],
    held_out: Collection[str],
    minimized: Collection[str] = (),
) -> list[Finding]:
    """Return all that goes wrong at the end of a history; of a healthy run, nothing.

    Args:
        history: what was logged so far, a mapping of figures per log, each with its `step`.
        trained: labels of the rewards of images that the run learns from.
        held_out: labels of those that it only watches (weight 0).
        minimized: labels of those of negative weight, which are to fall, in evaluations too.
    """
    run = _Run(history, trained, held_out)
    return [*_held_out(run, minimized), *_collapsed(run), *_drifted(run), *_lagging(run)]


def _held_out(run: _Run, minimized: Collection[str]) -> Iterable[Finding]:
    figures = [(f"rewards/{name}/mean", name) for name in run.held_out] + run.names("eval_rewards/(.+)/mean")
    for figure, name in figures:
        course = None if name in minimized else run.course(figure)
        if course is None:
            continue
        step, best = course.best()
        matters = run.unit(figure, course, step)
        if matters and course.now.max() < best - max(matters, NOISES * course.noise):
            where = "on the evaluation prompts" if figure.startswith("eval_") else "which is watched only"
            what = (
                f"{name!r}, {where}, fell from {best:.3g} (step {step}) to {course.latest:.3g}, by more than a standard"
            )
            yield _finding(run, "held-out", figure, f"{what} deviation of its samples", step)


def _collapsed(run: _Run) -> Iterable[Finding]:
    whose = {"student/diversity": "the samples of a prompt", "student/deviation": "all samples together"}
    for figure, of in whose.items():
        course = run.course(figure)
        if course is None:
            continue
        step, best = course.best()
        if course.now.max() < best - max((1 - LEFT) * best, NOISES * course.noise):
            what = f"{of} are alike: they differ by {course.latest:.3g}, {course.latest / best:.0%} of what it was"
            yield _finding(run, "collapse", figure, f"{what} at step {step}", step)
            return  # where all samples are alike, those of a prompt are


def _drifted(run: _Run) -> Iterable[Finding]:
    for figure, name in run.names("(.+)/gap"):
        course, error = run.course(figure), run.course(f"{name}/error")
        if course is None or error is None:
            continue
        step, least = course.best(lowest=True)
        beyond = course.now.min() > least + max((FARTHER - 1) * least, NOISES * course.noise)
        share = course.latest / (course.latest + error.latest)
        if beyond and share > MOSTLY:
            what = f"the student drifts away from the teacher: {name!r} sees {course.latest / least:.1f} times the"
            rest = f"mismatch of step {step}, now {share:.0%} of the samples' squared distance from the teacher"
            yield _finding(run, "drift", figure, f"{what} {rest}", step)


def _lagging(run: _Run) -> Iterable[Finding]:
    for figure, name in run.names("(.+)/lag"):
        lag, gap = run.course(figure), run.course(f"{name}/gap")
        if lag is None or gap is None or len(lag.levels) < KNOWN:
            continue
        mean, told = (float(course.levels[-KNOWN:].mean()) for course in (lag, gap))
        if mean > MOSTLY * told + NOISES * lag.noise / math.sqrt(KNOWN):
            yield Finding(
                "critic",
                figure,
                f"the critic of {name!r} lags behind the student: the mean square of the error that it makes for all "
                f"samples of a prompt alike is {mean:.2g}, and that of all it tells the student {told:.2g}. Raise "
                "critic_steps or critic_learning_rate, or lower learning_rate.",
            )


def _finding(run: _Run, kind: str, figure: str, what: str, best: int) -> Finding:
    """Return a finding with what rose meanwhile, and what to do about it."""
    if run.risen:
        names = " and ".join(run.risen)
        return Finding(
            "hack",
            figure,
            f"the student games its reward: {names} since the run began, and meanwhile {what}. Lower its weight (or "
            f"raise that of 'dm'), or stop earlier; checkpoints of about step {best} are the ones to keep.",
        )
    todo = {
        "held-out": "Lower the learning rates, or stop earlier",
        "collapse": "Lower learning_rate, raise the weight of 'dm', or stop earlier",
        "drift": "Lower learning_rate or the weights of the other rewards",
    }
    return Finding(kind, figure, f"{what}. {todo[kind]}; checkpoints of about step {best} are the ones to keep.")
