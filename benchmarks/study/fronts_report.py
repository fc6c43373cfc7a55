"""From the rows of `fronts.py` to docs/fronts.md: tables, plots, and how fronts compare with DMDR's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from fronts import METHODS, SETTINGS
from intervals import estimate, interval, ratio
from study_fronts import Front, cost_of_reward, hypervolume, reward_for_cost
from study_statistics import Row

from rdm_sdk import markdown_table

READING = Path(__file__).parent / "fronts_reading.md"
"""The page's text, written by hand."""
BASELINES = ("dmdr", "dmdr, told the step")


def write_report(rows: Sequence[Row], page: Path) -> None:
    """Write the page, and a plot beside it per setting."""
    parts = [READING.read_text(encoding="utf-8").rstrip()]
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] in ("", setting)]
        if not any(row["setting"] and row["method"] in BASELINES for row in own):
            parts.append(f"## {setting}\n\nNo point of {' or '.join(BASELINES)} has been run yet.")
            continue
        gain = gain_in(own, setting)
        fronts = {method: front for method in METHODS if (front := fronts_of(own, setting, method, gain))}
        picture = page.with_name(f"fronts_{setting}.png")
        plot(fronts, setting, picture)
        parts += [f"## {setting}", point_table(own), f"![{setting}]({picture.name})"]
        parts += [text for name in BASELINES if name in fronts for text in compared(fronts, name)]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def value_of(row: Row, reward: str) -> float:
    """Return a reward in units in which it is not saturated: legibility by the power of ten that it lacks."""
    return -math.log10(row["illegibility"] + 1e-7) if reward == "legibility" else float(row[reward])


def gain_in(rows: Sequence[Row], setting: str) -> Callable[[Row], float]:
    """Return what reads a row's gain over `gndmr` without rewards; of several rewards the mean of their shares.

    A share is of what the first baseline's strongest point gains on average, so 1 is what that point has.
    """
    names = SETTINGS[setting]
    start = {name: statistics.mean(value_of(r, name) for r in rows if r["point"] == "gndmr") for name in names}
    if len(names) == 1:
        return lambda row: value_of(row, names[0]) - start[names[0]]
    baseline = next(name for name in BASELINES if any(r["method"] == name and r["setting"] for r in rows))
    points = [row for row in rows if row["method"] == baseline and row["setting"]]
    last = max(row["weights"] for row in points)
    full = {n: statistics.mean(value_of(r, n) - start[n] for r in points if r["weights"] == last) for n in names}
    return lambda row: statistics.mean((value_of(row, name) - start[name]) / full[name] for name in names)


def fronts_of(rows: Sequence[Row], setting: str, method: str, gain: Callable[[Row], float]) -> dict[int, Front]:
    """Return a method's front per seed, from its run without rewards on; {} if it was not run in this setting."""
    base = "tilt" if method.startswith("tilt") else method
    found: dict[int, Front] = {}
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        points = [row for row in own if row["method"] == method and row["setting"] == setting]
        starts = [row for row in own if row["point"] == base]
        if points and starts:
            ordered = starts + sorted(points, key=lambda row: list(row["weights"]))
            found[seed] = [(gain(row), float(row["FID-SD"])) for row in ordered]
    return found


def point_table(rows: Sequence[Row]) -> str:
    """Return every point's rewards, trained on or not, beside its quality."""
    figures = {"FID-SD": 2, "jpeg": 4, "ink": 4, "illegibility": 5, "diversity": 3, "FID": 1}  # decimals
    lines = []
    for point in dict.fromkeys(row["point"] for row in rows):
        own = [row for row in rows if row["point"] == point]
        shown = [
            _rounded([row[name] for row in own], decimals) if all(name in row for row in own) else ""
            for name, decimals in figures.items()
        ]
        lines.append([point, len(own), *shown, f"{statistics.mean(row['cpu_seconds'] for row in own):.0f}"])
    return markdown_table(("point", "seeds", *figures, "CPU seconds"), lines)


def _rounded(values: Sequence[float], decimals: int) -> str:
    """Return the mean of several seeds with half of its interval's width, of one seed its value."""
    found = estimate(values)
    return f"{found.mean:.{decimals}f}" + (f" ± {found.half_width:.{decimals}f}" if found.count > 1 else "")


def compared(fronts: dict[str, dict[int, Front]], baseline: str) -> list[str]:
    """Return two tables over a baseline's points, what others have at its reward and at its FID-SD, and volumes."""
    theirs = fronts[baseline]
    others = {name: front for name, front in fronts.items() if name not in BASELINES}
    everyone = [point for front in fronts.values() for points in front.values() for point in points]
    corner = (min(reward for reward, _ in everyone), max(distance for _, distance in everyone))
    at_reward, at_distance = [], []
    for number in range(1, min(map(len, theirs.values()))):
        reward_line, distance_line = [f"point {number}"], [f"point {number}"]
        for ours in others.values():
            seeds = sorted(theirs.keys() & ours.keys())
            points = [(ours[seed], *theirs[seed][number]) for seed in seeds]
            costs = [(cost_of_reward(front, reward), distance) for front, reward, distance in points]
            logs = [math.log(cost / distance) for cost, distance in costs if cost is not None]
            bests = [(reward_for_cost(front, distance), reward) for front, reward, distance in points]
            gains = [best - reward for best, reward in bests if best is not None]
            reward_line.append(_counted(ratio, logs, len(seeds)))
            distance_line.append(_counted(partial(interval, decimals=4), gains, len(seeds)))
        at_reward.append(reward_line)
        at_distance.append(distance_line)
    volumes = ", ".join(
        f"{name} {estimate([hypervolume(points, corner) for points in front.values()])}"
        for name, front in {baseline: theirs, **others}.items()
    )
    return [
        f"Against {baseline}: FID-SD at the reward of its points, as a share of theirs.",
        markdown_table((baseline, *others), at_reward),
        "Reward at the FID-SD of its points, less theirs.",
        markdown_table((baseline, *others), at_distance),
        f"Hypervolumes: {volumes}.",
    ]


def _counted(show: Callable[[list[float]], str], values: list[float], seeds: int) -> str:
    """Return values as an interval, and how many of the seeds have one."""
    reached = f"{len(values)} of {seeds} seeds reach it"
    return f"{show(values)}, {reached}" if values else reached


def plot(fronts: dict[str, dict[int, Front]], setting: str, path: Path) -> None:
    """Plot gain in reward against FID-SD: a dot per seed, a line through the means."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, front in fronts.items():
        color = f"C{list(METHODS).index(method)}"
        means = [[statistics.mean(axis) for axis in zip(*at, strict=True)] for at in zip(*front.values(), strict=False)]
        axes.plot([d for _, d in means], [r for r, _ in means], marker="o", color=color, label=method)
        for points in front.values():
            axes.plot([d for _, d in points], [r for r, _ in points], ".", color=color, alpha=0.35)
    axes.set(xlabel="FID-SD (lower is better)", ylabel="gain in reward (higher is better)", title=setting)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
