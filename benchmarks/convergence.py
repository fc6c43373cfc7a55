"""How near students of the embedded teacher come to it, and whether they stay there.

    python benchmarks/convergence.py run                      # hours, two runs at a time; resumable
    python benchmarks/convergence.py run --only "dm alone" --seeds 0
    python benchmarks/convergence.py teacher                  # the ruler, three minutes
    python benchmarks/convergence.py report                   # docs/convergence.md and its plot, from the rows

Each measurement is a line of `results/convergence.jsonl`, written when it is made: the FID-SD of what the student (its
moving average, where it has one) predicts after each of its evaluations (1,000 images against the shipped statistics of
the teacher), and what the run has cost up to there. A run whose last line is there is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "convergence.jsonl"
SEEDS = range(5)

BATCH = "per_device_train_batch_size"
COMMON: dict[str, Any] = {
    BATCH: 64,
    "learning_rate": 1e-3,
    "critic_learning_rate": 4e-3,
    "ema_decay": 0.0,  # where rates fall to 0 within 150 updates, an average adds nothing at the end
    "guidance_scale": 1.0,
    "max_sequence_length": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 50,
}
LINE: dict[str, Any] = {"lr_scheduler_type": "linear"}
"""How rates fall where a cell says nothing. It was the package's default when the first cells were run, so it is no
part of what is hashed."""
RANK = 32


@dataclass(frozen=True)
class Cell:
    """One set of settings; it is run once per seed."""

    name: str
    updates: int
    every: int
    """Updates between two measurements."""
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = RANK
    """LoRA rank of student and critic, where they are LoRA adapters; 0 means that neither is."""
    rewards: str = "dm"

    def digest(self) -> str:
        """Return a hash of all that the cell's runs depend on, so that changed settings are run again."""
        content = json.dumps(asdict(self) | {"common": COMMON}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


DMD2: dict[str, Any] = {
    "matching": "mixture",
    "critic_rollouts": "fresh",
    "spread": "free",
    "critic_correction": "none",
    "normalization": "sample",
}
"""DMD2 as published (arXiv 2405.14867): the mixture of all steps, fresh rollouts for each critic update, each sample on
its own."""

DMD2_PRESET = DMD2 | {"num_generations": 1}
"""The same with one sample per prompt, as the package's preset has it."""

BY_SCORES: dict[str, Any] = {"reward_route": "gradient[dm=advantage]"}
"""R_dm as a score whose advantages make good transitions likelier, in the place of its gradient at x_0."""

FLOW = "dm + 3*flow"
"""The last step learns the teacher's own flow besides."""

LONG = 1000
SHORT = 150
SHORTEST = 60
GENTLE: dict[str, Any] = {"learning_rate": 5e-4, "critic_learning_rate": 2e-3, "ema_decay": 0.99}
"""Of long runs: half the rates of short ones, and the moving average that is the default."""
DEFAULT = "long, 4 steps, rate 0.0002, critics 2 times, falling to the second power"
LOW_RATES = ((2e-4, 2), (1e-4, 2), (1e-4, 4))
"""Of long runs: the student's rate, which falls in a line, and how many times as fast critics learn."""
ROOT: dict[str, Any] = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 4e-3,
    "lr_scheduler_type": "inverse_sqrt",
    "lr_scheduler_kwargs": {"timescale": 10},
    "ema_decay": 0.99,
}
"""Rates that fall as the root of the updates: fast at first, and after 1,000 updates at a tenth."""

FALLING = GENTLE | {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 4}}
"""The same rates, but they fall fast at first and are at 0 in the end."""
SQUARE: dict[str, Any] = {
    "ema_decay": 0.99,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2},
}
"""With rates of 2e-4 and 4e-4 the package's defaults."""
PATH: dict[str, Any] = {"matching": "path", "sampler": "ode"}
"""PDMD: a deterministic student, matched on its own path; the package's preset `pdmd`."""
QUICK: dict[str, Any] = SQUARE | {"learning_rate": 1e-3, "critic_learning_rate": 4e-3}
"""Of the shortest runs: the rates of short ones, and a moving average."""
TWO_STEPS: dict[str, Any] = {"num_inference_steps": 2, "shift": 3.0}
LOWER: dict[str, Any] = TWO_STEPS | {"shift": 1.5}
"""The second step begins at 0.6 of the noise, not at 3/4."""

ALONE = "dm alone"
"""The package's preset `gndm` at the rates that all cells share."""
ALONE_RATES = "rate 0.001, critics 4 times"
SWEPT_METHODS: dict[str, dict[str, Any]] = {"dmd2": DMD2_PRESET, "gndm": {}}
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
"""At which methods are compared, so that each can be taken at its best; critics have four times these, or the same."""


def at_rate(rate: float, times: int) -> dict[str, Any]:
    """Return settings of a rate, and of critics that learn so many times as fast."""
    return {"learning_rate": rate, "critic_learning_rate": times * rate}


def swept() -> dict[str, tuple[str, float, int]]:
    """Return cells by name with their method, the student's rate, and how many times as fast the critics learn."""
    named = {
        f"{method} preset, rate {rate:g}, critics {times} times": (method, rate, times)
        for rate, times in [*product(RATES, (4,)), *product(RATES[1:4], (1,))]
        for method in SWEPT_METHODS
    }
    return {ALONE if name == f"gndm preset, {ALONE_RATES}" else name: point for name, point in named.items()}


def all_cells() -> list[Cell]:
    """Return every cell, the most telling ones first."""
    return [
        Cell("dm and flow", SHORT, 50, rewards=FLOW),
        Cell(ALONE, SHORT, 50),
        *(Cell(f"matching {name}", SHORT, 50, {"matching": name}) for name in ("range", "mixture")),
        Cell("dmd2", SHORT, 50, DMD2),
        Cell("dmd2 with ranges", SHORT, 50, DMD2 | {"matching": "range"}),
        Cell("dmd2, told the step", SHORT, 50, DMD2 | {"matching": "step"}),
        Cell("group normalization", SHORT, 50, {"normalization": "group"}),
        Cell("four uses of a rollout", SHORT, 50, {"num_iterations": 4}),
        *(
            Cell(f"dm by policy gradient, rate {rate:g}", SHORT, 50, BY_SCORES | at_rate(rate, 4))
            for rate in (1e-4, 5e-4)
        ),
        Cell("fresh rollouts", SHORT, 50, {"critic_rollouts": "fresh"}),
        Cell("betas .9 and .999", SHORT, 50, {"adam_beta1": 0.9, "adam_beta2": 0.999}),
        *(
            Cell(
                f"full weights, rate {rate:g}",
                SHORT,
                50,
                {
                    "student_weights": "full",
                    "critic_weights": "full",
                    "learning_rate": rate,
                    "critic_learning_rate": 4 * rate,
                },
                0,
            )
            for rate in (3e-4, 1e-4)
        ),
        *(
            Cell(name, SHORT, 50, SWEPT_METHODS[method] | at_rate(rate, times))
            for name, (method, rate, times) in swept().items()
            if name != ALONE
        ),
        *shortest_cells(),
        *long_cells(),
    ]


def shortest_cells() -> list[Cell]:
    """Return the cells of PDMD and of what it is compared with, all as short."""
    return [
        Cell("60 updates, pdmd", SHORTEST, 20, QUICK | PATH),
        Cell("60 updates, pdmd + flow", SHORTEST, 20, QUICK | PATH, rewards="dm + flow"),
        Cell("60 updates, pdmd, 2 steps", SHORTEST, 20, QUICK | PATH | LOWER),
        Cell("60 updates, pdmd, 2 steps, twice the batch", SHORTEST, 20, QUICK | PATH | LOWER | {BATCH: 128}),
        Cell("60 updates, dm", SHORTEST, 20, QUICK),
        Cell("60 updates, dm, rate 0.0005", SHORTEST, 20, QUICK | at_rate(5e-4, 4)),
        Cell("60 updates, dm + 3*flow", SHORTEST, 20, QUICK, rewards=FLOW),
        Cell("60 updates, dm + 3*flow, falling as a root", SHORTEST, 20, ROOT, rewards=FLOW),
        Cell("60 updates, dm, deterministic student", SHORTEST, 20, QUICK | {"sampler": "ode"}),
    ]


def long_cells() -> list[Cell]:
    """Return the cells of runs that come near their end, half as long ones first."""
    return [
        Cell("half as long, 4 steps, falling to the fourth power, dm + 3*flow", LONG // 2, 50, FALLING, rewards=FLOW),
        Cell("half as long, 2 steps, falling to the fourth power, dm, shift 3", LONG // 2, 50, FALLING | TWO_STEPS),
        Cell(
            "half as long, 1 step, falling to the fourth power, dm", LONG // 2, 50, FALLING | {"num_inference_steps": 1}
        ),
        *(
            Cell(f"half as long, {method} preset, falling to the fourth power", LONG // 2, 50, settings | FALLING)
            for method, settings in SWEPT_METHODS.items()
        ),
        Cell("long, 4 steps, falling to the fourth power, dm + 3*flow", LONG, 50, FALLING, rewards=FLOW),
        Cell("long, 2 steps, falling to the fourth power, dm, shift 3", LONG, 50, FALLING | TWO_STEPS),
        Cell("long, 1 step, falling to the fourth power, dm", LONG, 50, FALLING | {"num_inference_steps": 1}),
        Cell("long, 4 steps, falling as a root, dm + 3*flow", LONG, 50, ROOT, rewards=FLOW),
        Cell("long, 2 steps, falling as a root, dm, shift 3", LONG, 50, ROOT | TWO_STEPS),
        Cell("long, 1 step, falling as a root, dm", LONG, 50, ROOT | {"num_inference_steps": 1}),
        *(
            Cell(
                f"long, 4 steps, rate {rate:g}, critics {times} times, dm + 3*flow",
                LONG,
                50,
                {"ema_decay": 0.99} | at_rate(rate, times),
                rewards=FLOW,
            )
            for rate, times in LOW_RATES
        ),
        *(
            Cell(f"{DEFAULT}, {name}", LONG, 50, SQUARE | at_rate(2e-4, 2) | settings, rewards=rewards)
            for name, settings, rewards in ((FLOW, {}, FLOW), ("pdmd", PATH, "dm"))
        ),
        *(Cell(f"long, 4 steps, {rewards}", LONG, 50, GENTLE, rewards=rewards) for rewards in (FLOW, "dm")),
        Cell("long, 2 steps, dm, shift 3", LONG, 50, GENTLE | TWO_STEPS),
        Cell("long, 1 step, dm", LONG, 50, GENTLE | {"num_inference_steps": 1}),
        *(Cell(f"long, full rates, no average, {rewards}", LONG, 50, rewards=rewards) for rewards in (FLOW, "dm")),
    ]


def run_teacher(seeds: Sequence[int], path: Path, num_samples: int = 1000) -> None:
    """Append what the teacher itself is in steps of equal size, which are the student's grid."""
    from rdm_sdk import digits
    from rdm_sdk.digits.demo import TEACHER_STEPS, sample_teacher

    done = {(row["seed"], row["steps"]) for row in read_rows(path) if row["cell"] == "teacher"}
    for seed, steps in product(seeds, TEACHER_STEPS):
        if (seed, steps) not in done:
            figures = sample_teacher(digits.prompts() * (num_samples // 10), noise_of(seed), steps).figures
            append(path, {"cell": "teacher", "seed": seed, "steps": steps, **figures})


def noise_of(seed: int) -> int:
    """Return the seed of the noise that runs of a seed, and the teacher beside them, are measured with.

    Each has noise of its own: the same 1,000 images' worth of it would favor some students everywhere (the teacher's
    own FID-SD at eight steps moves by more than one with its noise alone).
    """
    return 100_000 * (seed + 1)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def start_worker() -> None:
    """Give each process one thread: the tensors are small."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def run(cell: Cell, seed: int, path: Path, num_samples: int, keep: Path | None = None) -> None:
    """Train one student, append its measurements to a file as they are made, and keep it in a folder if asked to."""
    from peft import LoraConfig

    from rdm_sdk import RDMConfig, RDMTrainer, digits

    with tempfile.TemporaryDirectory() as folder:
        trainer = RDMTrainer(
            digits.teacher_path(),
            cell.rewards,
            RDMConfig(output_dir=folder, max_steps=cell.updates, seed=seed, **(LINE | COMMON | cell.settings)),
            digits.prompts(),
            peft_config=LoraConfig(r=cell.rank, lora_alpha=cell.rank) if cell.rank else None,
        )
        train(trainer, {"cell": cell.name, "seed": seed, "digest": cell.digest()}, cell.every, path, num_samples)
        if keep is not None:
            trainer.save_model(str(keep / cell.name / str(seed)))


def train(trainer: Any, row: dict[str, Any], every: int, path: Path, num_samples: int) -> None:
    """Train, and append the row with what is measured to a file: every so many updates, and at the end."""
    from transformers import TrainerCallback

    updates, spent, started = trainer.args.max_steps, 0.0, time.process_time()

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal spent
            if state.global_step % every and state.global_step < updates:
                return
            begin = time.process_time()
            place = {"update": state.global_step, "last": state.global_step == updates}
            figures = measure(trainer, num_samples, row["seed"])
            cost = {"costs": trainer.costs(), "cpu_seconds": begin - started - spent}
            append(path, row | place | figures | cost)
            spent += time.process_time() - begin

    trainer.add_callback(Measure())
    trainer.train()


def measure(trainer: Any, num_samples: int, seed: int) -> dict[str, Any]:
    """Return FID-SD after each evaluation, and how the last images are."""
    import torch

    from rdm_sdk import digits, diversity, frechet_distance, legibility, teacher_statistics

    prompts = digits.prompts() * (num_samples // 10)
    starts = range(0, num_samples, 250)
    batches = [trainer.sample_each_step(prompts[i : i + 250], seed=noise_of(seed) + i) for i in starts]
    steps = [torch.cat(images) for images in zip(*batches, strict=True)]
    return {
        "FID-SD": [frechet_distance(images, teacher_statistics()) for images in steps],
        "FID to real digits": frechet_distance(steps[-1], digits.heldout_images()),
        "diversity": diversity(steps[-1], prompts),
        "legibility": legibility(steps[-1], prompts),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the measurements of cells as they are defined now, of whole runs alone, each run's latest."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    teacher = [row for row in rows if row["cell"] == "teacher"]
    current = {cell.name: cell.digest() for cell in all_cells()}
    runs = [row for row in rows if row not in teacher and current.get(row["cell"]) == row["digest"]]
    latest = {(row["cell"], row["seed"], row["update"]): row for row in runs}
    whole = {key[:2] for key, row in latest.items() if row["last"]}
    return [*teacher, *(row for key, row in latest.items() if key[:2] in whole)]


def run_all(options: argparse.Namespace) -> None:
    """Run what is missing, seed by seed, so that whatever has been done so far is balanced."""
    path: Path = options.out
    cells = [cell for cell in all_cells() if any(fnmatchcase(cell.name, pattern) for pattern in options.only)]
    if options.smoke:
        if path == RESULTS:
            raise SystemExit("--smoke needs an --out of its own, so that its figures do not mix with the study's")
        small = {BATCH: 8}
        cells = [Cell(f"smoke {one.name}", 2, 1, one.settings | small, one.rank, one.rewards) for one in cells]
    done = {(row["cell"], row["seed"]) for row in read_rows(path)}
    tasks = [(cell, seed) for seed in options.seeds for cell in cells if (cell.name, seed) not in done]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.processes, context, start_worker) as pool,
        tqdm(total=len(tasks), unit="run") as progress,
    ):
        samples = 250 if options.smoke else 1000
        pending = [pool.submit(run, cell, seed, path, samples, options.keep) for cell, seed in tasks]
        for future in as_completed(pending):
            future.result()
            progress.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and measure what is missing")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    running.add_argument("--only", nargs="+", default=["*"], help="names of cells, or patterns such as 'long*'")
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--keep", type=Path, help="a folder for the students: <folder>/<cell>/<seed>")
    running.add_argument("--smoke", action="store_true", help="two updates each, 250 images")
    reporting = commands.add_parser("report", help="write the page and its plot from the rows")
    reporting.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "convergence.md")
    teaching = commands.add_parser("teacher", help="measure the teacher itself, in steps of equal size")
    teaching.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    for command in (running, reporting, teaching):
        command.add_argument("--out", type=Path, default=RESULTS, help="the file of the rows")
    options = parser.parse_args()
    if options.command == "run":
        run_all(options)
    elif options.command == "teacher":
        run_teacher(options.seeds, options.out)
    else:
        from convergence_report import write_report

        write_report(read_rows(options.out), options.page)


if __name__ == "__main__":
    main()
