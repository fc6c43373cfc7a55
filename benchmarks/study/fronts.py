"""Rewards on students that have converged: GNDMR and tilts against DMDR, all from the same students.

    python benchmarks/convergence.py run --only "*fourth power*" --keep build/students
    python benchmarks/study/fronts.py run --students build/students/long*fourth*    # a folder with a student per seed
    python benchmarks/study/fronts.py report              # docs/fronts.md and its plots, from the rows

Every run starts from the finished student of its seed, trains 80 updates with `dm` and rewards, and judges 1,000 of its
samples, from the same noise for all runs. A line of `results/fronts.jsonl` as each run ends; resumable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from study import BENCHMARKS, illegibility, judge, named_reward, run_tasks

RESULTS = BENCHMARKS / "results" / "fronts.jsonl"
SEEDS = range(5)

COMMON: dict[str, Any] = {
    "max_steps": 80,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-4,
    "critic_learning_rate": 8e-4,
    "guidance_scale": 1.0,
    "max_sequence_length": 4,
}
COLD_START = 20
"""Updates in which critics, which begin as the teacher, catch up with the student; rewards wait, for all methods."""

METHODS: dict[str, dict[str, Any]] = {
    "dmdr": {"preset": "dmdr"},
    "dmdr, told the step": {"preset": "dmdr", "matching": "step"},
    "dmdr, told, shared rollouts": {"preset": "dmdr", "matching": "step", "critic_rollouts": "shared"},
    "gndmr": {"preset": "gndmr"},
    "gndmr, equal evaluations": {"preset": "gndmr", "max_steps": 160},
    "tilt": {"preset": "tilt", "weighting": f"fixed[cold_start={COLD_START}]"},
    "tilt, ink by gradient": {
        "preset": "tilt",
        "weighting": f"fixed[cold_start={COLD_START}]",
        "reward_route": "tilt[ink=gradient]",
    },
}
"""DMDR as published, and with critics that are told the step or learn from the student's own rollouts, which is not
its own; GNDMR in as many updates, and in as many network evaluations as DMDR, which are twice the updates."""

SETTINGS: dict[str, tuple[str, ...]] = {"jpeg": ("jpeg",), "legibility": ("legibility",), "both": ("ink", "jpeg")}
"""A scored reward, a differentiable one, and two that conflict, one of each kind."""

Weights = tuple[float, ...]
WEIGHTS: dict[tuple[str, str], tuple[Weights, ...]] = {
    ("dmdr", "jpeg"): ((1.0,), (3.0,)),
    ("dmdr, told the step", "jpeg"): ((1.0,), (3.0,)),
    ("dmdr, told, shared rollouts", "jpeg"): ((1.0,), (3.0,)),
    ("gndmr", "jpeg"): ((5.0,), (15.0,)),
    ("gndmr, equal evaluations", "jpeg"): ((5.0,), (15.0,)),
    ("tilt", "jpeg"): ((0.1,), (0.2,)),
    ("dmdr", "legibility"): ((0.05,), (0.15,)),
    ("dmdr, told the step", "legibility"): ((0.05,), (0.15,)),
    ("gndmr", "legibility"): ((0.15,), (0.5,)),
    ("tilt", "legibility"): ((0.5,), (1.5,)),
    ("dmdr", "both"): ((0.03, 1.0), (0.06, 3.0)),
    ("dmdr, told the step", "both"): ((0.03, 1.0), (0.06, 3.0)),
    ("gndmr", "both"): ((0.2, 6.0), (0.5, 15.0)),
    ("tilt, ink by gradient", "both"): ((0.1, 0.25), (0.25, 0.5)),
}
"""The points of each front."""


@dataclass(frozen=True)
class Point:
    """One method at one set of weights; without rewards it is where the method's fronts begin."""

    method: str
    setting: str = ""
    weights: Weights = ()

    @property
    def name(self) -> str:
        return " ".join([self.method, self.setting, *map("{:g}".format, self.weights)]).strip()

    def config(self) -> dict[str, Any]:
        """Return the settings of `RDMConfig`."""
        from rdm_sdk import preset

        own = dict(METHODS[self.method])
        return preset(own.pop("preset")) | COMMON | own

    def rewards(self) -> list[tuple[Any, float]]:
        """Return the rewards with their weights."""
        names = SETTINGS.get(self.setting, ())
        return [("dm", 1.0), *((named_reward(name), weight) for name, weight in zip(names, self.weights, strict=True))]

    def digest(self) -> str:
        """Return a hash of all that the point's runs depend on but the student, so that changed settings run again."""
        content = json.dumps(asdict(self) | {"config": self.config()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def all_points() -> Iterator[Point]:
    """Yield every point, those without rewards first."""
    yield from (Point(method) for method in METHODS if method != "tilt, ink by gradient")
    yield from (Point(*key, weights) for key, own in WEIGHTS.items() for weights in own)


def run(
    point: Point, seed: int, student: Path, max_steps: int | None = None, num_samples: int = 1000
) -> dict[str, Any]:
    """Train a student further and judge it."""
    from rdm_sdk import RDMConfig, RDMTrainer, digits

    settings = (
        {"lr_scheduler_type": "linear"} | point.config() | ({} if max_steps is None else {"max_steps": max_steps})
    )
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 20}
        args = RDMConfig(output_dir=folder, seed=seed, start_from=str(student), **quiet, **settings)
        trainer = RDMTrainer(digits.teacher_path(), point.rewards(), args, digits.prompts())
        started = time.process_time()
        trainer.train()
    return {
        "point": point.name,
        "method": point.method,
        "setting": point.setting,
        "weights": point.weights,
        "seed": seed,
        "digest": point.digest(),
        "cpu_seconds": round(time.process_time() - started, 1),
        **judge(trainer, num_samples),
        **({"illegibility": illegibility(trainer, 5 * num_samples)} if point.setting in ("", "legibility") else {}),
        "costs": trainer.costs(),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of points as they are defined now, the last of each seed."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    current = {point.name: point.digest() for point in all_points()}
    return list({(r["point"], r["seed"]): r for r in rows if current.get(r["point"]) == r["digest"]}.values())


def run_all(options: argparse.Namespace) -> None:
    """Run what is missing, seed by seed."""
    points = [point for point in all_points() if any(fnmatchcase(point.name, pattern) for pattern in options.only)]
    missing = [seed for seed in options.seeds if not (options.students / str(seed)).is_dir()]
    if missing:
        raise SystemExit(f"{options.students} has no student of seed {missing[0]}; see above: --help")
    done = {(row["point"], row["seed"]) for row in read_rows(options.out)}
    tasks = [(point, seed) for seed in options.seeds for point in points if (point.name, seed) not in done]
    size = (options.max_steps, 1000 if options.max_steps is None else 100)
    run_tasks(
        run, [(p, seed, options.students / str(seed), *size) for p, seed in tasks], options.processes, options.out
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and judge what is missing")
    running.add_argument("--students", type=Path, required=True, help="a folder with a finished student per seed")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    running.add_argument("--only", nargs="+", default=["*"], help="names of points, or patterns such as 'tilt*'")
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--max_steps", type=int, help="fewer updates and samples, to see that it runs")
    reporting = commands.add_parser("report", help="write the page and its plots from the rows")
    reporting.add_argument("--page", type=Path, default=BENCHMARKS.parent / "docs" / "fronts.md")
    for command in (running, reporting):
        command.add_argument("--out", type=Path, default=RESULTS, help="the file of the rows")
    options = parser.parse_args()
    if options.command == "run":
        if options.max_steps is not None and options.out == RESULTS:
            raise SystemExit("--max_steps needs an --out of its own, so that its figures do not mix with the study's")
        run_all(options)
    else:
        from fronts_report import write_report

        write_report(read_rows(options.out), options.page)


if __name__ == "__main__":
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # for what the benchmarks share; a script sees its own folder alone
    main()
