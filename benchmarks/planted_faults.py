"""What the logs of a healthy run look like, and those of runs that are made to fail, on the embedded digits.

    OMP_NUM_THREADS=1 python benchmarks/planted_faults.py --out build/faults    # table and picture; two minutes of CPU

docs/collapse.md has what it prints, and the picture.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rdm_sdk import Capabilities, RDMConfig, RDMTrainer, Reward, RewardBatch, digits, markdown_table

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "learning_rate": 1e-3,
    "critic_learning_rate": 4e-3,
    "lr_scheduler_type": "linear",
    "critic_steps": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": 4,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
FIGURES = ("dm/residual", "dm/critic_loss", "dm/gap", "student/diversity", "student/deviation")
ENDS = 5
"""Steps at either end of a run that a figure is averaged over."""


class Alike(Reward):
    """Minus the squared distance of a sample from the mean of its group: a collapse is what maximizes it."""

    name = "alike"
    capabilities = Capabilities(space="pixel", gradient="autograd", scope="group")

    def score(self, batch: RewardBatch) -> Tensor:
        groups = batch.images.unflatten(0, (-1, batch.group_size))
        distances: Tensor = (groups - groups.mean(1, keepdim=True)).square().flatten(2).mean(2)
        return -distances.flatten()


class Bright(Reward):
    """The mean of a picture, which a white square maximizes."""

    name = "bright"
    capabilities = Capabilities(space="pixel", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Case:
    """A run by what is done to it."""

    name: str
    rewards: list[tuple[Any, float]]
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("healthy", [("dm", 1.0)]),
    Case("a reward for samples that are alike", [("dm", 0.2), (Alike(), 1.0)]),
    Case("brightness at three times dm", [("dm", 1.0), (Bright(), 3.0), ("legibility", 0.0)]),
    Case("a critic that does not learn", [("dm", 1.0)], {"critic_learning_rate": 1e-6}),
)


def trained(case: Case, steps: int, folder: Path) -> RDMTrainer:
    """Return a trainer after its run, whose last pictures are in `folder`."""
    args = RDMConfig(output_dir=str(folder), max_steps=steps, log_images=steps, **(SETTINGS | case.settings))
    trainer = RDMTrainer(digits.teacher_path(), case.rewards, args, digits.prompts())
    trainer.train()
    return trainer


def row(case: Case, history: list[dict[str, Any]]) -> list[str]:
    """Return a row of the table: each figure at the beginning and at the end, and the step of the watch's finding."""
    logs = [log for log in history if FIGURES[0] in log]
    cells = []
    for name in FIGURES:
        values = [log[name] for log in logs]
        first, last = (sum(part) / len(part) for part in (values[:ENDS], values[-ENDS:]))
        cells.append(f"{first:.2g} to {last:.2g}")
    found = next((f"step {log['step']}" for log in history if "watch" in log), "nothing")
    return [case.name, *cells, found]


def stacked(pictures: list[Path], target: Path) -> None:
    """Write gray pictures one below the other, with a gap between."""
    images = [Image.open(path).convert("L") for path in pictures]
    gap = 12
    height = sum(image.height + gap for image in images) - gap
    page = Image.new("L", (max(image.width for image in images), height), "white")
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height + gap
    page.save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/faults"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    rows, pictures = [], []
    for number, case in enumerate(CASES):
        folder = options.out / str(number)
        rows.append(row(case, trained(case, options.steps, folder).state.log_history))
        pictures.append(folder / "images" / f"step_{options.steps:06d}.png")
    table = markdown_table(["run", *(f"`{name}`" for name in FIGURES), "the watch finds"], rows)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    stacked(pictures[:3], options.out / "pictures.png")
    print(table)


if __name__ == "__main__":
    main()
