"""Fronts of reward against FID-SD: how they compare, and what the study's page says of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from intervals import Estimate, estimate, interval, ratio
from study_cells import KINDS, SETTINGS, front_cells
from study_plots import picture
from study_statistics import Results, Row

from rdm_sdk import markdown_table


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
    return -math.log10(1 - row["legibility"] + 1e-7) if reward == "legibility" else float(row[reward])


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
    points = front_cells(kind, setting)
    cells = [KINDS[kind][1], *points]
    if not points or not all(map(results.has, cells)):
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


def equal_lines(results: Results, setting: str, baseline: str, kinds: Iterable[str] = KINDS) -> list[str]:
    """Return two tables over a method's points: what others have at its reward, and what they have at its FID-SD."""
    fronts = {kind: found for kind in (baseline, *kinds) if (found := seed_fronts(results, setting, kind))}
    theirs = fronts.pop(baseline, {})
    if not theirs or not fronts:
        return []

    def at_equal_reward(ours: Front, reward: float, distance: float) -> float | None:
        cost = cost_of_reward(ours, reward)
        return None if cost is None else math.log(cost / distance)

    def at_equal_distance(ours: Front, reward: float, distance: float) -> float | None:
        best = reward_for_cost(ours, distance)
        return None if best is None else best - reward

    text: list[str] = []
    for what, compare_at, show in (("reward", at_equal_reward, ratio), ("FID-SD", at_equal_distance, interval)):
        lines = []
        for point, cell in enumerate(front_cells(baseline, setting), start=1):
            line = [cell]
            for ours in fronts.values():
                seeds = sorted(theirs.keys() & ours.keys())
                compared = [compare_at(ours[seed], *theirs[seed][point]) for seed in seeds]
                known = [value for value in compared if value is not None]
                reached = f"{len(known)} of {len(seeds)} seeds reach it"
                line.append(f"{show(known)}, {reached}" if len(known) > 1 else reached)
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
    return [*text, "", *equal_lines(results, setting, "dmdr")]


def front_confirmation_lines(fresh: Results, both: Results, setting: str) -> list[str]:
    """Return how fronts compare with DMDR's on the confirming seeds, where they were run on them, and on all seeds.

    Where legibility is the reward, it is that of the larger sample.
    """
    text = []
    if setting == "legibility":
        fresh, both = fresh.counted(), both.counted()
    baselines = ("dmdr", "dmdr from the start")
    ours = tuple(kind for kind in KINDS if kind not in baselines and seed_fronts(fresh, setting, kind))
    for name, results in (("fresh seeds", fresh), ("all seeds", both)):
        for baseline in baselines:
            if ours and seed_fronts(results, setting, baseline):
                volumes = front_volumes(results, setting, (baseline, *ours)).items()
                said = "; ".join(f"{kind} {volume} ({volume.count} seeds)" for kind, volume in volumes)
                text += [f"**{setting}, {name}.** Hypervolume: {said}.", ""]
                text += equal_lines(results, setting, baseline, ours)
    if not text:
        return [f"{setting}: not run yet.", ""]
    cells = [cell for kind in ("dmdr", *ours) for cell in front_cells(kind, setting) if both.has(cell)]
    return [*text, "All seeds:", "", reward_table(both, cells), ""]
