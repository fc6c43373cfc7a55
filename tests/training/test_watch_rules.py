"""The watch's rules on made histories: what is planted is found and explained, and what wavers is left alone."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from rdm_sdk.training.watch_rules import LASTING, Course, Finding, findings

History = list[dict[str, Any]]
TRAINED, HELD_OUT = ("ink",), ("legibility",)


def wavering(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return noise of deviation 1, half of which lasts from a log to the next ones."""
    slow, kept = np.zeros(count), rng.uniform(0, 0.9)
    for i in range(1, count):
        slow[i] = kept * slow[i - 1] + math.sqrt(1 - kept**2) * rng.normal()
    return math.sqrt(0.5) * slow + math.sqrt(0.5) * rng.normal(size=count)


def healthy(seed: int, count: int | None = None) -> History:
    """Return what a healthy run of 20 to 200 logs could have logged: it learns, wavers, has a spike."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 200)) if count is None else count
    time = np.linspace(0, 1, count)
    learned = 1 - np.exp(-time * rng.uniform(1, 10))
    samples = rng.choice([8, 32, 128])  # of a log: the fewer, the noisier
    columns = {
        "rewards/ink/mean": rng.uniform(-1, 3) * learned + wavering(rng, count) / math.sqrt(samples),
        "rewards/ink/std": np.full(count, 1.0),
        "rewards/legibility/mean": 0.9 + 0.05 * learned + 0.2 * wavering(rng, count) / math.sqrt(samples),
        "rewards/legibility/std": np.full(count, 0.2),
        "student/diversity": (0.4 + rng.uniform(-0.1, 0.2) * learned) * np.exp(0.1 * wavering(rng, count)),
        "student/deviation": (0.6 + rng.uniform(-0.1, 0.1) * learned) * np.exp(0.05 * wavering(rng, count)),
        "dm/gap": (0.02 - rng.uniform(0, 0.015) * learned) * np.exp(rng.uniform(0.1, 0.4) * wavering(rng, count)),
        "dm/error": (0.05 + 0.05 * learned) * np.exp(0.1 * wavering(rng, count)),
        "dm/lag": 0.02 * rng.uniform(0.1, 1) * rng.normal(size=count),  # each step has samples of its own
    }
    for values in columns.values():
        values[rng.random(count) < 0.02] *= 3
    return [{"step": 10 * (i + 1)} | {name: float(v[i]) for name, v in columns.items()} for i in range(count)]


def first_found(history: History) -> tuple[int, list[Finding]]:
    """Return after how many logs the watch finds something in the second half, and what; (0, []) if it does not."""
    for seen in range(len(history) // 2 - 1, len(history) + 1, 3):
        if found := findings(history[:seen], TRAINED, HELD_OUT):
            return seen, found
    return 0, []


def planted(history: History, name: str, factor: float, start: float = 0.5, rate: float = 1.0) -> History:
    """Multiply a figure by a factor that it comes to `rate` of the way to by the end, from a share of the run on."""
    begin = int(start * len(history))
    for i, row in enumerate(history[begin:]):
        row[name] *= 1 + (factor - 1) * min(1.0, 2 * rate * i / (len(history) - begin))
    return history


def alarms(seeds: range, every: int) -> list[tuple[int, str]]:
    """Return the healthy runs that are disturbed at any time, looked at after every so many of their logs, and why."""
    found: dict[int, str] = {}
    for seed in seeds:
        history = healthy(seed)
        for seen in range(2 * LASTING, len(history) + 1, every):
            for finding in findings(history[:seen], TRAINED, HELD_OUT):
                found.setdefault(seed, finding.figure)
    return list(found.items())


def test_healthy_runs_raise_no_alarm() -> None:
    """Fifteen of them."""
    assert alarms(range(15), every=8) == []


@pytest.mark.slow
def test_false_alarms_are_rarer_than_one_run_in_a_hundred() -> None:
    """Two hundred runs, looked at after every third log."""
    found = alarms(range(200), every=3)
    print("alarms:", found)
    assert len(found) <= 2, found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("figure", "factor", "kind", "words"),
    [
        ("rewards/legibility/mean", 0.3, "held-out", "'legibility', which is watched only, fell from 0.9"),
        ("student/diversity", 0.2, "collapse", "the samples of a prompt are alike"),
        ("student/deviation", 0.2, "collapse", "all samples together are alike"),
        ("dm/gap", 30.0, "drift", "the student drifts away from the teacher"),
    ],
)
def test_what_is_planted_is_found_before_the_end(seed: int, figure: str, factor: float, kind: str, words: str) -> None:
    """With the figure, its values, and what to do; after it began, which is in the middle of the run."""
    history = planted(healthy(seed, 100), figure, factor)
    for row in history:
        row["rewards/ink/mean"] = 0.0
    seen, (found, *_) = first_found(history)
    assert 50 < seen < 95
    assert (found.kind, found.figure) == (kind, figure)
    assert words in found.text
    assert "ower" in found.text
    assert "checkpoints of about step" in found.text


@pytest.mark.parametrize("figure", ["rewards/legibility/mean", "student/diversity", "dm/gap"])
def test_a_reward_that_rose_meanwhile_is_named_as_the_cause(figure: str) -> None:
    """The same findings, when a trained reward has risen since the beginning, are one kind: the reward is gamed."""
    history = planted(healthy(1, 100), figure, 30.0 if figure == "dm/gap" else 0.2)
    for i, row in enumerate(history):
        row["rewards/ink/mean"] = 0.05 * i
    _, (found, *_) = first_found(history)
    assert (found.kind, found.figure) == ("hack", figure)
    assert "the student games its reward: 'ink' rose from 0." in found.text
    assert "since the run began, and meanwhile" in found.text


def test_held_out_prompts_count_for_every_reward() -> None:
    """A trained reward that falls on the evaluation prompts is told, by its deviation there."""
    rows = [
        {"step": i, "eval_rewards/ink/mean": 1.0 - 0.1 * max(0, i - 10), "eval_rewards/ink/std": 0.3} for i in range(20)
    ]
    (found,) = findings(rows, TRAINED, HELD_OUT)
    assert (found.kind, found.figure) == ("held-out", "eval_rewards/ink/mean")
    assert "on the evaluation prompts, fell from 1 " in found.text
    assert findings(rows, (), HELD_OUT, ["ink"]) == []  # of negative weight: it was to fall


def test_a_critic_that_lags_is_told_from_a_noisy_one() -> None:
    """An error in common of most of the gap; the same on average, but lost in noise, is none."""
    rng = np.random.default_rng(0)
    for scatter, expected in ((0.002, ["critic"]), (0.05, [])):
        rows = [{"step": i, "dm/gap": 0.02, "dm/error": 0.1, "dm/lag": rng.normal(0.018, scatter)} for i in range(40)]
        assert [found.kind for found in findings(rows, (), ())] == expected


def test_a_fall_within_the_spread_of_samples_is_none() -> None:
    """However surely it is measured: what matters is large against how much samples differ."""
    rows = [{"step": i, "rewards/a/mean": 1.0 - 0.01 * i, "rewards/a/std": 1.0} for i in range(40)]
    assert findings(rows, (), ["a"]) == []
    for row in rows:
        row["rewards/a/std"] = 0.1
    assert [found.kind for found in findings(rows, (), ["a"])] == ["held-out"]


def test_too_short_a_history_tells_nothing() -> None:
    """There must be a past to compare with: ten logs."""
    rows = [{"step": i, "student/diversity": 1.0 if i < 5 else 0.1} for i in range(10)]
    assert findings(rows[:9], (), ()) == []
    assert [found.kind for found in findings(rows, (), ())] == ["collapse"]


@pytest.mark.parametrize("count", [10, 49, 50, 51, 99, 100, 101, 1234])
def test_levels_cover_a_run_evenly(count: int) -> None:
    """At most 50, the newest whole; NaN and infinity are left out."""
    points = [(i, float(i)) for i in range(count)]
    course = Course.of([*points, (count, math.nan), (count + 1, math.inf)])
    assert 2 * LASTING <= len(course.levels) <= 50
    assert course.steps[-1] == count - 1
    width = math.ceil(count / 50)
    assert course.levels[-1] == count - 1 - (width - 1) / 2
    assert course.levels[0] <= width


def test_long_histories_are_quick() -> None:
    """A log of 2,000 rows is judged within a tenth of a second, or the watch would show in a run's time."""
    history = healthy(0, 2000)
    start = time.process_time()
    findings(history, TRAINED, HELD_OUT)
    assert time.process_time() - start < 0.1
