"""The study's plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from study_cells import KINDS, METHODS, RATES, front_cells, sweep_cell
from study_statistics import Results, Row

TEACHER_FOUR_STEPS = 31.82
"""FID-SD of the teacher itself at the student's four steps (docs/digits.md)."""
COLORS = {kind: f"C{index}" for index, kind in enumerate(KINDS)}


def plot_sweep(results: Results, path: Path) -> None:
    """Plot FID-SD against the learning rate, every seed a dot."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, method in enumerate(METHODS):
        rates = [rate for rate in RATES if results.has(sweep_cell(method, rate))]
        means = [results.of(sweep_cell(method, rate), "FID-SD").mean for rate in rates]
        axes.plot(rates, means, color=f"C{index}", label=method)
        for rate in rates:
            values = [row["FID-SD"] for row in results.rows[sweep_cell(method, rate)]]
            axes.plot([rate] * len(values), values, ".", color=f"C{index}", alpha=0.6)
    axes.axhline(TEACHER_FOUR_STEPS, color="gray", linestyle=":", label="teacher, 4 steps")
    axes.set(xscale="log", yscale="log", xlabel="learning rate of the student", ylabel="FID-SD")
    axes.legend()
    _save(figure, path)


def plot_reuse(results: Results, cells: Sequence[str], path: Path) -> None:
    """Plot FID-SD along the runs (or at their end) against student rollouts and against all network evaluations."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    for index, cell in enumerate(cells):
        rows = results.rows[cell]
        points = [[*row["curve"], {"FID-SD": row["FID-SD"], **row["costs"]}] for row in rows]
        quality = [statistics.mean(p["FID-SD"] for p in at) for at in zip(*points, strict=True)]
        for panel, names in zip(
            panels, (("rollouts",), ("student_forwards", "fake_forwards", "teacher_forwards")), strict=True
        ):
            cost = [
                statistics.mean(sum(p[f"cost/{name}"] for name in names) for p in at)
                for at in zip(*points, strict=True)
            ]
            style = "--" if "no weights" in cell else "-"
            panel.plot(cost, quality, style, marker="o", color=plt.get_cmap("tab20")(index), label=cell)
    panels[0].set(xlabel="student rollouts (samples)", ylabel="FID-SD", xscale="log", yscale="log")
    panels[1].set(xlabel="network evaluations (samples)")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    _save(figure, path)


def plot_fronts(results: Results, read: Callable[[Row], float], setting: str, path: Path) -> None:
    """Plot a row's reward against FID-SD, from the run without rewards on: a dot per seed, a line through the means."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, (_, base, _) in KINDS.items():
        present = [cell for cell in (base, *front_cells(kind, setting)) if results.has(cell)]
        if len(present) < 2:
            continue
        means = [(results.of(cell, "FID-SD").mean, results.of(cell, read).mean) for cell in present]
        axes.plot(*zip(*means, strict=True), marker="o", color=COLORS[kind], label=kind)
        for cell in present:
            for row in results.rows[cell]:
                axes.plot(row["FID-SD"], read(row), ".", color=COLORS[kind], alpha=0.3)
    axes.set(
        xscale="log", xlabel="FID-SD (lower is better)", ylabel="gain in reward over GNDM (in its seeds' deviations)"
    )
    axes.set_title(setting)
    if axes.lines:
        axes.legend()
    _save(figure, path)


def picture(name: str) -> str:
    """Return a plot's path beside the page."""
    return f"study_{name.replace(' ', '_')}.png"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
