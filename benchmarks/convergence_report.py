"""From the rows of `convergence.py` to docs/convergence.md: tables with 95 % intervals, and a plot along the runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle, product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from convergence import ALONE, swept
from intervals import estimate

from rdm_sdk import markdown_table, teacher_steps_worth

Row = dict[str, Any]
COLORS = matplotlib.color_sequences["tab10"]
READING = Path(__file__).parent / "convergence_reading.md"
"""The page's text, written by hand."""


def write_report(rows: Sequence[Row], page: Path) -> None:
    """Write the page: the reading, the tables, the plots beside it; the rates of methods have a table of their own."""
    curve = teacher_curve(rows)
    runs = [row for row in rows if row["cell"] != "teacher"]
    found = list(dict.fromkeys(row["cell"] for row in runs))
    rates = [cell for cell in swept() if cell in found]
    cells = [cell for cell in found if cell not in rates or cell == ALONE]
    parts = [READING.read_text(encoding="utf-8").rstrip()]
    if curve:
        parts.append("## The teacher, in steps of equal size\n\n" + teacher_table(rows))
    if not cells:
        parts.append("## Where runs end\n\nNone of the cells of `benchmarks/convergence.py` has been run yet.")
    else:
        parts.append("## Where runs end\n\n" + end_table(runs, cells, curve))
        parts.append("## Along the runs\n\n" + drift_table(runs, cells))
        picture = page.with_name("convergence_runs.png")
        plot_runs(runs, cells, curve, picture)
        parts.append(f"![FID-SD after the last evaluation, along the runs]({picture.name})")
    if len(rates) > 1:
        picture = page.with_name("convergence_rates.png")
        parts.append("## Each method at several rates\n\n" + rate_table(runs, rates))
        plot_rates(runs, rates, curve, picture)
        parts.append(f"![FID-SD against the learning rate, DMD2 and GNDM]({picture.name})")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def teacher_curve(rows: Sequence[Row]) -> dict[int, float]:
    """Return the teacher's mean FID-SD by its number of steps."""
    own = [row for row in rows if row["cell"] == "teacher"]
    return {
        steps: estimate([row["FID-SD"] for row in own if row["steps"] == steps]).mean
        for steps in sorted({row["steps"] for row in own})
    }


def teacher_table(rows: Sequence[Row]) -> str:
    """Return the teacher's figures by its number of steps, over the seeds of its noise."""
    own = [row for row in rows if row["cell"] == "teacher"]
    figures = ("FID-SD", "FID to real digits", "diversity", "legibility")
    lines = [
        [steps, *(str(estimate([row[name] for row in own if row["steps"] == steps])) for name in figures)]
        for steps in sorted({row["steps"] for row in own})
    ]
    return markdown_table(("steps", *figures), lines)


def end_table(rows: Sequence[Row], cells: Sequence[str], curve: dict[int, float]) -> str:
    """Return FID-SD after each evaluation at the end of the runs, with what the runs cost."""
    lines = []
    for cell in cells:
        last = [row for row in rows if row["cell"] == cell and row["last"]]
        by_step = [estimate(list(values)) for values in zip(*(row["FID-SD"] for row in last), strict=True)]
        costs = [sum(row["costs"][f"cost/{role}_forwards"] for role in ("student", "fake", "teacher")) for row in last]
        lines.append(
            [
                cell,
                len(last),
                last[0]["update"],
                ", ".join(f"{own.mean:.3g}" for own in by_step),
                str(by_step[-1]),
                teacher_steps_worth(by_step[-1].mean, curve) if curve else "",
                str(estimate([row["diversity"] for row in last])),
                f"{estimate([row['legibility'] for row in last]).mean:.4f}",
                f"{estimate(costs).mean / 1e6:.2f} M",
                f"{estimate([row['cpu_seconds'] for row in last]).mean:.0f}",
            ]
        )
    header = ("runs", "seeds", "updates", "FID-SD after each evaluation", "after the last", "worth teacher steps")
    return markdown_table((*header, "diversity", "legibility", "network evaluations", "CPU seconds"), lines)


def drift_table(rows: Sequence[Row], cells: Sequence[str]) -> str:
    """Return how far FID-SD after the last evaluation rises above the lowest that it has had by then, per seed."""
    lines = []
    for cell in cells:
        seeds = sorted({row["seed"] for row in rows if row["cell"] == cell})
        for seed in seeds:
            own = sorted((r for r in rows if r["cell"] == cell and r["seed"] == seed), key=lambda row: row["update"])
            values = [row["FID-SD"][-1] for row in own]
            lowest = min(range(len(values)), key=values.__getitem__)
            rise = max(value / before for value, before in zip(values, accumulate(values, min), strict=True)) - 1
            lines.append([cell, seed, values[lowest], own[lowest]["update"], values[-1], f"{rise:.0%}"])
    header = ("runs", "seed", "lowest", "at update", "at the end", "highest rise above the lowest so far")
    return markdown_table(header, lines)


def rate_table(rows: Sequence[Row], cells: Sequence[str]) -> str:
    """Return where runs end at each rate of each method."""
    points, lines = swept(), []
    for cell in sorted(cells, key=points.__getitem__):
        method, rate, times = points[cell]
        last = [row for row in rows if row["cell"] == cell and row["last"]]
        by_step = [estimate(list(values)) for values in zip(*(row["FID-SD"] for row in last), strict=True)]
        figures = (", ".join(f"{own.mean:.3g}" for own in by_step), str(by_step[-1]))
        lines.append([method, rate, times, len(last), *figures, str(estimate([row["diversity"] for row in last]))])
    header = ("preset", "rate", "critics, times that", "seeds", "FID-SD after each evaluation", "after the last")
    return markdown_table((*header, "diversity"), lines)


def plot_rates(rows: Sequence[Row], cells: Sequence[str], curve: dict[int, float], path: Path) -> None:
    """Plot FID-SD after the last evaluation against the rate: a line per method and pace of its critics."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    points = {cell: point for cell, point in swept().items() if cell in cells}
    kinds = sorted({(method, times) for method, _, times in points.values()})
    swept_rates = sorted({rate for _, rate, _ in points.values()})
    for kind, color in zip(kinds, COLORS, strict=False):
        own = sorted((rate, cell) for cell, (method, rate, times) in points.items() if (method, times) == kind)
        ends = [[row["FID-SD"][-1] for row in rows if row["cell"] == cell and row["last"]] for _, cell in own]
        rates = [rate for rate, _ in own]
        label = f"{kind[0]}, critics {kind[1]} times as fast" if kind[1] > 1 else f"{kind[0]}, critics as fast"
        axes.plot(rates, [sum(values) / len(values) for values in ends], color=color, label=label)
        for rate, values in zip(rates, ends, strict=True):
            axes.plot([rate] * len(values), values, ".", color=color)
    for steps in (8, 40):
        if steps in curve:
            axes.axhline(curve[steps], color="gray", linestyle=":", linewidth=1)
            axes.annotate(
                f"teacher, {steps} steps", (max(swept_rates), curve[steps]), color="gray", va="bottom", ha="right"
            )
    axes.set(xscale="log", yscale="log", xlabel="learning rate of the student", ylabel="FID-SD (lower is better)")
    ticks = (7, 8, 10, 12, 15, 20, 30, 50, 100, 200)
    axes.set_yticks(ticks, map(str, ticks))
    axes.set_xticks(swept_rates, [f"{rate:g}" for rate in swept_rates])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_runs(rows: Sequence[Row], cells: Sequence[str], curve: dict[int, float], path: Path) -> None:
    """Plot FID-SD after the last evaluation against the updates, the seeds' mean and each seed; a panel per length."""
    ends = {cell: max(row["update"] for row in rows if row["cell"] == cell) for cell in cells}
    lengths = sorted(set(ends.values()))
    figure, panels = plt.subplots(len(lengths), figsize=(11, 5 * len(lengths)), layout="constrained", squeeze=False)
    for axes, length in zip(panels[:, 0], lengths, strict=True):
        shown = [cell for cell in cells if ends[cell] == length]
        for cell, (style, color) in zip(shown, cycle(product(("-", "--"), COLORS)), strict=False):
            own = [row for row in rows if row["cell"] == cell]
            updates = sorted({row["update"] for row in own})
            at = [[row["FID-SD"][-1] for row in own if row["update"] == update] for update in updates]
            axes.plot(updates, [sum(values) / len(values) for values in at], style, color=color, label=cell)
            for update, values in zip(updates, at, strict=True):
                axes.plot([update] * len(values), values, ".", color=color, alpha=0.4)
        for steps in (4, 8, 40):
            if steps in curve:
                axes.axhline(curve[steps], color="gray", linestyle=":", linewidth=1)
                axes.annotate(f"teacher, {steps} steps", (0, curve[steps]), color="gray", fontsize=11, va="bottom")
        axes.set(xlim=(0, None), xlabel="updates of the student", ylabel="FID-SD (lower is better)", yscale="log")
        ticks = (6, 7, 8, 10, 12, 15, 20, 30, 40)
        axes.set_yticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
