"""From the study's raw results to `docs/study.md`: tables with 95 % intervals, plots, comparisons. For `study.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from intervals import Estimate, estimate
from study_cells import CONFIRMING_SEEDS, FRESH, METHODS, RATES, SEEDS, SETTINGS, all_cells, long_cell, sweep_cell
from study_fronts import front_confirmation_lines, front_lines, gain, reward_table
from study_plots import picture, plot_fronts, plot_reuse, plot_sweep
from study_statistics import Results, Row, compare

from rdm_sdk import markdown_table

BOUNDS = (40, 45, 50, 55, 60, 70)
"""FID-SD that a stable run stays below: several, so that none is picked."""


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


MIXTURE_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MIXTURE_METHODS = ("dmd2", "stratified", "shared", "gndm_whole", "gndm", "gndm_shared")


def mixture_lines(path: Path) -> list[str]:
    """Return the tables of the closed-form part, if it was run."""
    if not path.is_file():
        return ["Not run."]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells: dict[str, list[Row]] = {}
    for row in {(row["name"], row["seed"]): row for row in rows}.values():  # a cell's last run of a seed
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
    compared: tuple[str, ...] = (
        "dmd2, lr 0.0008",
        "gndm, lr 0.0008",
        "dmd2",
        "gndm",
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
        page = Path(__file__).parents[2] / "docs" / "study.md" if out == RESULTS else out / "study.md"
    rows = read_runs(out / "runs.jsonl")
    results, fresh, both = (
        Results(r for r in rows if r["seed"] in seeds)
        for seeds in (SEEDS, CONFIRMING_SEEDS, (*SEEDS, *CONFIRMING_SEEDS))
    )
    if not results.has("dmd2") and results.has("gndm"):
        raise SystemExit(f"{out / 'runs.jsonl'} has no runs of dmd2 and gndm; start with: study.py run")
    plot_sweep(results, page.parent / picture("sweep"))
    reuse = [c.name for c in all_cells() if c.questions == "c" and c.name != FRESH and results.has(c.name)]
    plotted = [cell for cell in (FRESH, "gndm", *reuse) if "lr" not in cell and results.has(cell)]
    plot_reuse(results, plotted, page.parent / picture("reuse"))
    for setting in SETTINGS:
        plot_fronts(results, gain(results, setting), setting, page.parent / picture(f"front_{setting}"))
    others = [c.name for c in all_cells() if (c.questions == "d" or c.preset == "refl") and results.has(c.name)]
    reading = Path(__file__).parent / "study_reading.md"
    sections = [
        reading.read_text(encoding="utf-8").strip(),
        "## a. DMD2 against GNDM\n\n" + "\n".join(sweep_lines(results)),
        "## Confirmed on seeds that nothing was chosen on\n\n" + "\n".join(confirmation_lines(fresh, both)),
        "## On a closed-form mixture\n\n" + "\n".join(mixture_lines(out / "mixture.jsonl")),
        "## b. DMDR against GNDMR\n\n" + "\n".join(line for s in SETTINGS for line in front_lines(results, s)),
        "### DMDR against the others, more seeds\n\n"
        + "\n".join(line for s in SETTINGS for line in front_confirmation_lines(fresh, both, s)),
        "## c. Importance sampling\n\n" + "\n".join(reuse_lines(results, both, reuse)),
        "## d, e. Guidance, adversary, and rewards alone\n\n" + reward_table(results, ["gndm", *others]),
    ]
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {page}")
    return page
