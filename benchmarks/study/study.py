"""The study: GNDM against DMD2, GNDMR against DMDR, importance sampling, and rewards of the model itself.

    python benchmarks/study/study.py run                  # all cells, five seeds, two processes; hours; resumable
    python benchmarks/study/study.py run --only gndm "dmd2*" --seeds 5 6 7 8 9      # to confirm a comparison
    python benchmarks/study/study.py report               # docs/study.md and its plots, from the raw results
    python benchmarks/study/study.py run --smoke --out build/study                  # to see that it runs
    python benchmarks/study/study.py report --out build/study

Every run trains one student on the embedded teacher and judges 1,000 of its samples, made from the same noise for all
cells of a seed. Raw results go to `<out>/runs.jsonl`, a line as each run ends; a run that is already there with the
same settings is not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from study_cells import LORA_TARGETS, SEEDS, Cell, all_cells
from tqdm import tqdm

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))  # for what the benchmarks share; a script sees its own folder alone
SMOKE = ("dmd2", "gndm", "4 uses", "balance, ink against jpeg 0.1 and 3")


def start_worker() -> None:
    """Prepare a process: one thread, because the tensors are small, and no chatter."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"


def run(cell: Cell, seed: int, num_samples: int, max_steps: int | None = None) -> dict[str, Any]:
    """Train one student and judge it."""
    from peft import LoraConfig

    from rdm_sdk import RDMConfig, RDMTrainer, digits

    settings = cell.config()
    if max_steps is not None:
        settings["max_steps"] = max_steps
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 4}
        trainer = RDMTrainer(
            digits.teacher_path(),
            [(named_reward(name), weight) for name, weight in cell.rewards],
            RDMConfig(output_dir=folder, seed=seed, **quiet, **settings),
            training_data(with_images="adversarial" in dict(cell.rewards)),
            peft_config=LoraConfig(r=32, lora_alpha=32, target_modules=LORA_TARGETS),
        )
        curve: list[dict[str, float]] = []
        if cell.curve:
            trainer.add_callback(curve_callback(trainer, curve, num_samples // 2))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        logged = [row for row in trainer.state.log_history if "loss" in row]
    kept = ("weights/", "ratio/", "weighting/", "/pull")
    return {
        "cell": cell.name,
        "questions": cell.questions,
        "seed": seed,
        "digest": cell.digest(),
        "max_steps": settings["max_steps"],
        "learning_rate": settings["learning_rate"],
        **judge(trainer, num_samples),
        **({"illegibility": illegibility(trainer, 5 * num_samples)} if cell.counts_failures else {}),
        "costs": trainer.costs(),
        "curve": curve,
        "last_log": {name: value for name, value in logged[-1].items() if any(part in name for part in kept)},
        "seconds": round(seconds, 1),
    }


def named_reward(name: str) -> Any:
    """Return a reward by name; `ink` is the study's own."""
    if name != "ink":
        return name
    from rdm_sdk import Capabilities, Reward, RewardBatch

    class Ink(Reward):
        """How bright a picture is on average, in [0, 1]: bold strokes, which cost bytes."""

        name = "ink"
        capabilities = Capabilities(space="pixel", gradient="autograd", range=(0.0, 1.0))

        def score(self, batch: RewardBatch) -> Any:
            return batch.images.mean(dim=(1, 2, 3))

    return Ink()


def training_data(with_images: bool) -> Any:
    """Return prompts and, for an adversary to learn from, a real scan of the teacher's training split beside each.

    Without the scans, which no other reward reads and which take long to fetch, a run is the same to the bit.
    """
    from datasets import Dataset
    from digits_teacher import load_split

    from rdm_sdk import digits
    from rdm_sdk.digits.classifier import scans_to_images

    split = load_split()
    rows = [(split["train_labels"] == digit).nonzero()[:20, 0] for digit in range(10)]
    order = [int(rows[digit][i]) for i in range(20) for digit in range(10)]
    columns = {"prompt": [digits.prompts()[int(split["train_labels"][i])] for i in order]}
    if with_images:
        images = (scans_to_images(split["train_scans"][order]) * 255).round().byte().permute(0, 2, 3, 1)
        columns["image"] = images.tolist()
    return Dataset.from_dict(columns)


def judge(trainer: Any, num_samples: int) -> dict[str, float]:
    """Return the quality of a student: distances, rewards (also those it was not trained on) and diversity."""
    from rdm_sdk import digits, frechet_distance, score_images, teacher_statistics

    prompts, images = draw_samples(trainer, num_samples)
    scores = score_images(["legibility", "jpeg"], images, prompts, batch_size=500).outputs
    by_prompt = images[:, 0].reshape(-1, 10, images.shape[-1] ** 2)
    return {
        "FID-SD": frechet_distance(images, teacher_statistics()),
        "FID": frechet_distance(images, digits.heldout_images()),
        "legibility": scores["legibility"].scores.mean().item(),
        "jpeg": scores["jpeg"].scores.mean().item(),
        "ink": images.mean().item(),
        "diversity": by_prompt.std(0).mean().item(),
    }


def draw_samples(trainer: Any, count: int) -> tuple[list[str], Any]:
    """Return prompts and a student's images of them; the first of many are those of fewer."""
    import torch

    from rdm_sdk import digits

    prompts = digits.prompts() * (count // 10)
    return prompts, torch.cat([trainer.sample(prompts[i : i + 250], seed=1000 + i) for i in range(0, count, 250)])


def illegibility(trainer: Any, count: int) -> float:
    """Return what legibility lacks on average, of more samples: of 1,000, one or two make up most of it."""
    from rdm_sdk import score_images

    prompts, images = draw_samples(trainer, count)
    scores = score_images(["legibility"], images, prompts, batch_size=500).outputs["legibility"].scores
    return float((1 - scores.double()).mean())


def curve_callback(trainer: Any, curve: list[dict[str, float]], num_samples: int) -> Any:
    """Return a callback that measures FID-SD at a quarter, half and three quarters of a run, with its cost so far."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step * 4 % state.max_steps == 0 and state.global_step < state.max_steps:
                curve.append({"step": state.global_step, **judge(trainer, num_samples), **trainer.costs()})

    return Curve()


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the raw results of cells as they are defined now, a cell's last run of a seed."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    current = {cell.name: cell.digest() for cell in all_cells()}
    latest = {(row["cell"], row["seed"]): row for row in rows if current.get(row["cell"]) == row["digest"]}
    return list(latest.values())


def run_all(options: argparse.Namespace) -> None:
    """Run what is missing, seed by seed, so that whatever has been done so far is balanced."""
    out: Path = options.out
    if options.smoke and out == RESULTS:
        raise SystemExit("--smoke needs an --out of its own, so that its figures do not mix with the study's")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    cells = [cell for cell in all_cells() if any(fnmatchcase(cell.name, own) for own in options.only)]
    if options.smoke:
        cells, options.seeds = [cell for cell in cells if cell.name in SMOKE], options.seeds[:2]
    samples, max_steps = (200, 4) if options.smoke else (1000, None)
    kept = read_runs(path)
    if options.complete:
        counting = {cell.name for cell in cells if cell.counts_failures}
        kept = [row for row in kept if row["cell"] not in counting or "illegibility" in row]
    done = {(row["cell"], row["seed"]) for row in kept}
    tasks = [(cell, seed) for seed in options.seeds for cell in cells if (cell.name, seed) not in done]
    tasks.sort(key=lambda task: not set("ac") & set(task[0].questions))  # the estimator first, on which the rest stands
    run_tasks(run, [(cell, seed, samples, max_steps) for cell, seed in tasks], options.processes, path)


def run_tasks(run: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int, path: Path) -> None:
    """Call a function with each task's arguments, in processes, and append what it returns as a line of a file."""
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker) as pool,
        tqdm(total=len(tasks), unit="run") as progress,
    ):
        for future in as_completed([pool.submit(run, *task) for task in tasks]):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(future.result()) + "\n")
            progress.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and judge what is missing")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    running.add_argument("--only", nargs="+", default=["*"], help="names of cells, or patterns such as 'gndm*'")
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--complete", action="store_true", help="run again what lacks illegibility, a later addition")
    running.add_argument("--smoke", action="store_true", help="four cells, two seeds, four steps, 200 samples")
    reporting = commands.add_parser("report", help="write the page and its plots from the raw results")
    reporting.add_argument("--page", type=Path, help="the Markdown file; docs/study.md, or beside other results")
    for command in (running, reporting):
        command.add_argument("--out", type=Path, default=RESULTS, help="the folder of the raw results")
    options = parser.parse_args()
    if options.command == "run":
        run_all(options)
    else:
        from study_report import write_report

        write_report(options.out, options.page)


if __name__ == "__main__":
    main()
