"""From the study's raw results to `docs/study.md`: tables with 95 % intervals, plots, comparisons. For `study.py`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t
from study_cells import (
    CONFIRMING_SEEDS,
    FRESH,
    KINDS,
    METHODS,
    RATES,
    SEEDS,
    SETTINGS,
    all_cells,
    front_cells,
    long_cell,
    sweep_cell,
)
from study_plots import plot_fronts, plot_reuse, plot_sweep

from rdm_sdk import markdown_table

Row = dict[str, Any]
TEACHER_FOUR_STEPS = 31.82
"""FID-SD of the teacher itself at the student's four steps (docs/digits.md)."""
BOUNDS = (40, 45, 50, 55, 60, 70)
"""FID-SD that a stable run stays below: several, so that none is picked."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half_width:.2g}"

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval; one value alone has an unknown, so infinite, one."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], float("inf"), count)
    half_width = student_t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
    return Estimate(statistics.mean(values), float(half_width), count)


class Results:
    """The raw rows, by cell."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[str, list[Row]] = {}
        for row in rows:
            self.rows.setdefault(row["cell"], []).append(row)
        # One seed says nothing: such cells are for the next call of `study.py run` to finish.
        self.rows = {cell: own for cell, own in self.rows.items() if len(own) > 1}

    def has(self, cell: str) -> bool:
        return cell in self.rows

    def of(self, cell: str, figure: str | Callable[[Row], float]) -> Estimate:
        """Return the estimate of a figure: its name, or a function of the row."""
        read = figure if callable(figure) else lambda row: float(row[figure])
        return estimate([read(row) for row in self.rows[cell]])

    def cost(self, cell: str, name: str) -> float:
        return statistics.mean(row["costs"].get(f"cost/{name}", 0) for row in self.rows[cell])

    def total_forwards(self, cell: str) -> float:
        """Return all network evaluations of a run, in samples: student, critic and teacher."""
        return sum(self.cost(cell, f"{role}_forwards") for role in ("student", "fake", "teacher"))


def stable_range(results: Results, method: str, bound: float) -> float:
    """Return the factor between the lowest and the highest of neighboring rates whose mean FID-SD is below a bound.

    1 is a single rate, 0 none. Only the rates that were run count; nothing is interpolated.
    """
    widest = 0.0
    current: list[float] = []
    for rate in RATES:
        cell = sweep_cell(method, rate)
        holds = results.has(cell) and results.of(cell, "FID-SD").mean < bound
        current = [*current, rate] if holds else []
        widest = max(widest, current[-1] / current[0] if current else 0.0)
    return widest


def interval(values: Sequence[float]) -> str:
    """Return a mean with its 95 % interval, as text; one value has none."""
    own = estimate(values)
    return f"{own.mean:.2f} [{own.low:.2f}, {own.high:.2f}]"


def ratio(logs: Sequence[float]) -> str:
    """Return the geometric mean of ratios, from their logarithms, with its 95 % interval."""
    own = estimate(logs)
    return f"{math.exp(own.mean):.3f} [{math.exp(own.low):.3f}, {math.exp(own.high):.3f}]"


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


def cost_table(results: Results, cells: Sequence[str]) -> str:
    """Return quality and cost of cells."""
    header = ("cell", "seeds", "FID-SD", "FID", "diversity", "teacher fwd", "rollouts", "student fwd", "all fwd")
    lines = []
    for cell in cells:
        quality = [results.of(cell, figure) for figure in ("FID-SD", "FID", "diversity")]
        costs = [results.cost(cell, name) for name in ("teacher_forwards", "rollouts", "student_forwards")]
        counts = [f"{cost:.0f}" for cost in (*costs, results.total_forwards(cell))]
        lines.append([cell, quality[0].count, *quality, *counts])
    return markdown_table(header, lines)


def reward_table(results: Results, cells: Sequence[str]) -> str:
    """Return rewards, trained on or not, beside quality."""
    figures = ("FID-SD", "legibility", "jpeg", "ink", "diversity", "FID")
    lines = []
    for cell in cells:
        shown = [results.of(cell, figure) for figure in figures]
        lines.append([cell, shown[0].count, f"{shown[0]}", *(f"{e.mean:.5f} ± {e.half_width:.5f}" for e in shown[1:])])
    return markdown_table(("cell", "seeds", *figures), lines)


def native(row: Row, reward: str) -> float:
    """Return a reward in units in which it is not saturated: legibility, near 1 in all cells, by what it lacks."""
    return -math.log10(1 - row[reward] + 1e-7) if reward == "legibility" else float(row[reward])


def gain(results: Results, setting: str) -> Callable[[Row], float]:
    """Return the gain in a setting's rewards over `gndm`, each in deviations over its seeds, averaged."""
    names = SETTINGS[setting].rewards
    base = {name: [native(row, name) for row in results.rows["gndm"]] for name in names}
    scales = {name: max(statistics.pstdev(values), 1e-9) for name, values in base.items()}

    def of(row: Row) -> float:
        return statistics.mean((native(row, n) - statistics.mean(base[n])) / scales[n] for n in names)

    return of


Front = list[tuple[float, float]]
"""Points (reward, FID-SD) of one seed, from the run without rewards on."""


def hypervolume(points: Front, reference: tuple[float, float]) -> float:
    """Return the area between points (reward up, FID-SD down) and a reference that is worse than all of them."""
    area, best = 0.0, reference[0]
    for reward, distance in sorted(points, key=lambda point: point[1]):
        if reward > best and distance < reference[1]:
            area += (reward - best) * (reference[1] - distance)
            best = reward
    return area


def cost_of_reward(points: Front, reward: float) -> float | None:
    """Return the lowest FID-SD at which a front reaches a reward, linear between its points; None if it does not."""
    reached = [distance for own, distance in points if own >= reward]
    for (r, d), (other_r, other_d) in permutations(points, 2):
        if r < reward < other_r:
            reached.append(d + (other_d - d) * (reward - r) / (other_r - r))
    return min(reached, default=None)


def reward_for_cost(points: Front, distance: float) -> float | None:
    """Return the highest reward that a front has at an FID-SD or a lower one; None if all its points are worse."""
    mirrored = cost_of_reward([(-own, -reward) for reward, own in points], -distance)
    return None if mirrored is None else -mirrored


def seed_fronts(results: Results, setting: str, kind: str) -> dict[int, Front]:
    """Return a method's front per seed, {} if some of it was not run."""
    cells = [KINDS[kind][1], *front_cells(kind, setting)]
    if not all(map(results.has, cells)):
        return {}
    read = gain(results, setting)
    seeds = set.intersection(*({row["seed"] for row in results.rows[cell]} for cell in cells))
    rows = {(row["cell"], row["seed"]): row for cell in cells for row in results.rows[cell]}
    return {n: [(read(rows[c, n]), float(rows[c, n]["FID-SD"])) for c in cells] for n in sorted(seeds)}


def front_volumes(results: Results, setting: str, kinds: Iterable[str] = KINDS) -> dict[str, Estimate]:
    """Return the hypervolume of every method's front, over seeds, against a reference that is worse than every run."""
    fronts = {kind: found for kind in kinds if (found := seed_fronts(results, setting, kind))}
    if not fronts:
        return {}
    everyone = [point for found in fronts.values() for front in found.values() for point in front]
    reference = (min(reward for reward, _ in everyone), max(distance for _, distance in everyone))
    return {
        kind: estimate([hypervolume(front, reference) for front in found.values()]) for kind, found in fronts.items()
    }


def dmdr_lines(results: Results, setting: str, kinds: Iterable[str] = KINDS) -> list[str]:
    """Return two tables over DMDR's points: what others have at its reward, and what they have at its FID-SD."""
    fronts = {kind: found for kind in kinds if (found := seed_fronts(results, setting, kind))}
    theirs = fronts.pop("dmdr", {})
    if not theirs or not fronts:
        return []

    def at_equal_reward(ours: Front, reward: float, distance: float) -> float | None:
        cost = cost_of_reward(ours, reward)
        return None if cost is None else math.log(cost / distance)

    def at_equal_distance(ours: Front, reward: float, distance: float) -> float | None:
        best = reward_for_cost(ours, distance)
        return None if best is None else best - reward

    text = []
    for what, compare_at, show in (("reward", at_equal_reward, ratio), ("FID-SD", at_equal_distance, interval)):
        lines = []
        for point, cell in enumerate(front_cells("dmdr", setting), start=1):
            line = [cell]
            for ours in fronts.values():
                seeds = sorted(theirs.keys() & ours.keys())
                compared = [compare_at(ours[seed], *theirs[seed][point]) for seed in seeds]
                found = [value for value in compared if value is not None]
                reached = f"{len(found)} of {len(seeds)} seeds reach it"
                line.append(f"{show(found)}, {reached}" if len(found) > 1 else reached)
            lines.append(line)
        text += [markdown_table((f"at the {what} of", *fronts), lines), ""]
    return text


def front_lines(results: Results, setting: str) -> list[str]:
    """Return the text of one reward setting."""
    bases = list(dict.fromkeys(base for _, base, _ in KINDS.values()))
    cells = [c for c in (*bases, *(c for k in KINDS for c in front_cells(k, setting))) if results.has(c)]
    if not any(results.has(cell) for cell in cells if cell not in bases):
        return [f"### {setting}", "", "Not run yet.", ""]
    text = [f"### {setting}", "", reward_table(results, cells), "", f"![{setting}]({picture(f'front_{setting}')})", ""]
    volumes = front_volumes(results, setting)
    text += [f"- Hypervolume of {kind}: {volume} ({volume.count} seeds)" for kind, volume in volumes.items()]
    return [*text, "", *dmdr_lines(results, setting)]


def picture(name: str) -> str:
    """Return a plot's path beside the page."""
    return f"study_{name.replace(' ', '_')}.png"


MIXTURE_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MIXTURE_METHODS = ("dmd2", "stratified", "shared", "gndm_whole", "gndm", "gndm_shared")


def mixture_lines(path: Path) -> list[str]:
    """Return the tables of the closed-form part, if it was run."""
    if not path.is_file():
        return ["Not run."]
    cells: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        cells.setdefault(row["name"], []).append(row)

    def of(cell: str, figure: str) -> Estimate | str:
        return estimate([float(row[figure]) for row in cells[cell]]) if cell in cells else ""

    def swept(method: str, rate: float) -> str:
        return method if rate == 2e-3 else f"{method}_lr{rate:g}"

    rates = [[f"{rate:g}", *(of(swept(m, rate), "kl") for m in MIXTURE_METHODS)] for rate in MIXTURE_RATES]
    named = {swept(method, rate) for method in MIXTURE_METHODS for rate in MIXTURE_RATES}
    others = []
    for cell, rows in cells.items():
        if cell not in named or cell in MIXTURE_METHODS:
            counts = [f"{rows[0][name]:.0f}" for name in ("rollouts", "student_forwards", "critic_steps")]
            others.append([cell, len(rows), of(cell, "kl"), of(cell, "mode_tv"), *counts])
    header = ("cell", "seeds", "KL", "mode distance", "rollouts", "student fwd", "critic steps")
    start, floor = (of("dmd2", figure) for figure in ("start_kl", "floor_kl"))
    return [
        f"KL of the student to the teacher in nats; it starts at {start}, and a perfect student measures "
        f"{floor}. `gndm` has stratified draws and the correction by the other "
        "samples, `gndm_whole` that by all of the group, `gndm_shared` shared draws.",
        "",
        markdown_table(("learning rate", *MIXTURE_METHODS), rates),
        "",
        "All other cells, at a learning rate of 0.002 unless named (mode distance: total variation of mode masses):",
        "",
        markdown_table(header, others),
    ]


def sweep_lines(results: Results) -> list[str]:
    """Return question a's text."""
    lines = []
    for rate in RATES:
        cells = [sweep_cell(method, rate) for method in METHODS]
        if any(results.has(cell) for cell in cells):
            lines.append([f"{rate:g}", *(results.of(c, "FID-SD") if results.has(c) else "" for c in cells)])
    text = [markdown_table(("learning rate", *METHODS), lines), ""]
    best = {}
    for method in METHODS:
        cells = [cell for rate in RATES if results.has(cell := sweep_cell(method, rate))]
        if cells:
            best[method] = min(cells, key=lambda cell: results.of(cell, "FID-SD").mean)
    ranges = [[f"{bound:g}", *(f"{stable_range(results, m, bound):g}" for m in METHODS)] for bound in BOUNDS]
    text = [*text, "Stable range: the factor between the rates at which the mean FID-SD is below a bound.", ""]
    text += [markdown_table(("FID-SD below", *METHODS), ranges), ""]
    text += [f"- Each at its best rate: {compare(results, best[m], best['dmd2'])}." for m in best if m != "dmd2"]
    for rate in RATES:
        for method in METHODS:
            cells = [sweep_cell(method, rate), sweep_cell("dmd2", rate)]
            if method != "dmd2" and all(map(results.has, cells)):
                text.append(f"- At one rate: {compare(results, *cells)}.")
    compared = (
        "dmd2, lr 0.0008",
        "gndm, lr 0.0008",
        "dmd2",
        "gndm",
        "gndm, whole group",
        "gndm, shared sigma",
        "gndm, groups of 4",
        "gndm, groups of 16",
    )
    compared += ("dmd2, lr 0.0032", "gndm without correction, lr 0.0032", "gndm, lr 0.0032")
    compared += (long_cell("dmd2"), long_cell("gndm"))
    own = [cell for cell in compared if results.has(cell)]
    return [*text, "", f"![learning rates]({picture('sweep')})", "", cost_table(results, own), ""]


CONFIRMED = (
    (sweep_cell("gndm", 8e-4), sweep_cell("dmd2", 8e-4)),
    ("gndm", "dmd2"),
    ("gndm", sweep_cell("dmd2", 8e-4)),
    (long_cell("gndm"), long_cell("dmd2")),
    ("gndm, groups of 16", "dmd2, groups of 16"),
    ("gndm, groups of 16", "dmd2"),
    ("gndm, groups of 16", sweep_cell("dmd2", 8e-4)),
    ("gndm, groups of 16", "gndm"),
)
"""Comparisons run again on fresh seeds: at the two best rates, across them, in longer runs, and with larger groups."""


def front_confirmation_lines(fresh: Results, both: Results) -> list[str]:
    """Return how DMDR's fronts and the tilt's compare on the confirming seeds, and on these with the first five."""
    kinds, text = ("dmdr", "tilt"), []
    for setting in SETTINGS:
        for name, results in (("fresh seeds", fresh), ("all seeds", both)):
            if all(seed_fronts(results, setting, kind) for kind in kinds):
                volumes = front_volumes(results, setting, kinds).items()
                said = "; ".join(f"{kind} {volume} ({volume.count} seeds)" for kind, volume in volumes)
                text += [f"**{setting}, {name}.** Hypervolume: {said}.", "", *dmdr_lines(results, setting, kinds)]
    cells = [cell for setting in SETTINGS for kind in kinds for cell in front_cells(kind, setting) if both.has(cell)]
    if text:
        text += ["All seeds:", "", reward_table(both, cells)]
    return text or ["Not run yet."]


def confirmation_lines(fresh: Results, both: Results) -> list[str]:
    """Return the comparisons on the confirming seeds, and on these together with the first five."""
    pairs = [pair for pair in CONFIRMED if all(map(fresh.has, pair))]
    if not pairs:
        return ["Not run yet."]
    cells = list(dict.fromkeys(cell for pair in pairs for cell in pair))
    lines = []
    for pair in pairs:
        lines += [f"- Fresh seeds: {compare(fresh, *pair)}.", f"- All seeds: {compare(both, *pair)}."]
    return [*lines, "", cost_table(both, cells)]


def reuse_lines(results: Results, both: Results, cells: Sequence[str]) -> list[str]:
    """Return question c's text: costs, and what each kind of reuse costs and gives against no reuse at all."""
    shown = [cell for cell in (FRESH, "gndm", sweep_cell("gndm", 8e-4), *cells) if results.has(cell)]
    lines = [cost_table(results, shown), "", f"![uses of a rollout]({picture('reuse')})", ""]
    for cell in ("gndm", *cells) if results.has(FRESH) else ():
        if "lr" not in cell:
            rollouts = results.cost(cell, "rollouts") / results.cost(FRESH, "rollouts")
            forwards = results.total_forwards(cell) / results.total_forwards(FRESH)
            lines.append(
                f"- {compare(both, cell, FRESH)}; {rollouts:.3f} of the rollouts, {forwards:.2f} of the evaluations."
            )
    return lines


def write_report(out: Path, page: Path | None) -> Path:
    """Write the page and its plots; returns the page's path."""
    from study import RESULTS, read_runs

    if page is None:
        page = Path(__file__).parents[1] / "docs" / "study.md" if out == RESULTS else out / "study.md"
    rows = read_runs(out / "runs.jsonl")
    results, fresh, both = (
        Results(r for r in rows if r["seed"] in seeds)
        for seeds in (SEEDS, CONFIRMING_SEEDS, (*SEEDS, *CONFIRMING_SEEDS))
    )
    if not results.has("dmd2") and results.has("gndm"):
        raise SystemExit(f"{out / 'runs.jsonl'} has no runs of dmd2 and gndm; start with: study.py run")
    plot_sweep(results, page.parent / picture("sweep"))
    reuse = [cell.name for cell in all_cells() if "uses" in cell.name and results.has(cell.name)]
    plot_reuse(results, [c for c in ("gndm", *reuse) if "lr" not in c], page.parent / picture("reuse"))
    for setting in SETTINGS:
        plot_fronts(results, setting, page.parent / picture(f"front_{setting}"))
    others = [c.name for c in all_cells() if (c.questions == "d" or c.preset == "refl") and results.has(c.name)]
    reading = Path(__file__).parent / "study_reading.md"
    sections = [
        reading.read_text(encoding="utf-8").strip(),
        "## a. DMD2 against GNDM\n\n" + "\n".join(sweep_lines(results)),
        "## Confirmed on seeds that nothing was chosen on\n\n" + "\n".join(confirmation_lines(fresh, both)),
        "## On a closed-form mixture\n\n" + "\n".join(mixture_lines(out / "mixture.jsonl")),
        "## b. DMDR against GNDMR\n\n" + "\n".join(line for s in SETTINGS for line in front_lines(results, s)),
        "### DMDR against the tilt on fresh seeds\n\n" + "\n".join(front_confirmation_lines(fresh, both)),
        "## c. Importance sampling\n\n" + "\n".join(reuse_lines(results, both, reuse)),
        "## d, e. Guidance, adversary, and rewards alone\n\n" + reward_table(results, ["gndm", *others]),
    ]
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {page}")
    return page
