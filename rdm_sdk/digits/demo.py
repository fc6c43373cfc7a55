"""The demo: distill the embedded digits teacher into a 4-step student, with the public API and plain diffusers only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor

from rdm_sdk import (
    RDMConfig,
    RDMTrainer,
    digits,
    diversity,
    frechet_distance,
    image_grid,
    legibility,
    markdown_table,
    teacher_statistics,
    teacher_steps_worth,
)

GUIDANCE = 1.0
CALL = {"max_sequence_length": digits.TEXT_TOKENS, "output_type": "pt"}
TEACHER_STEPS = (1, 2, 4, 8, 16, 40)
STUDENT_STEPS = 4
REWARDS = "dm + 3*flow"
"""Distribution matching at every step; the last one learns the teacher's own flow besides."""
BATCH = 250
"""Images that are sampled at a time."""
HEADER = ("", "FID-SD", "worth teacher steps", "FID to real digits", "diversity", "legibility", "ms / image")


@dataclass(frozen=True)
class Row:
    """One sampler's images and what a table says of them."""

    name: str
    images: Tensor
    """`[N, 3, 32, 32]`."""
    figures: dict[str, float]
    """By column."""


def demo_config(output: Path, steps: int, seed: int) -> RDMConfig:
    """Return the settings that distill the digits teacher in four minutes on two CPU cores."""
    return RDMConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        critic_learning_rate=4e-3,
        lr_scheduler_type="inverse_sqrt",  # after n updates the rates are sqrt(10 / (n + 10)) of these
        lr_scheduler_kwargs={"timescale": 10},
        guidance_scale=GUIDANCE,
        num_inference_steps=STUDENT_STEPS,
        max_sequence_length=digits.TEXT_TOKENS,
        log_images=max(1, steps // 4),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        seed=seed,
    )


def demo_trainer(output: Path, steps: int, seed: int) -> RDMTrainer:
    """Return the demo's trainer."""
    return RDMTrainer(
        model=digits.teacher_path(),
        reward_funcs=REWARDS,
        args=demo_config(output, steps, seed),
        train_dataset=digits.prompts(),
        peft_config=LoraConfig(r=32, lora_alpha=32),
    )


def run_demo(output: Path, steps: int = 120, num_samples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train, export, reload into plain diffusers, measure; prints a table and writes `grid.png` and `table.md`.

    Returns:
        The table's figures by row and column: the teacher at several numbers of steps, and the student after each of
        its evaluations. "worth teacher steps" is in the printed table alone.
    """
    started = time.perf_counter()
    prompts = digits.prompts() * (num_samples // 10)
    teacher = [sample_teacher(prompts, seed, count) for count in TEACHER_STEPS]
    curve = dict(zip(TEACHER_STEPS, (row.figures["FID-SD"] for row in teacher), strict=True))

    print(f"distilling: {steps} steps, pictures in {output / 'training' / 'images'}", flush=True)
    trainer = demo_trainer(output / "training", steps, seed)
    trainer.train()
    trainer.save_model(str(output / "student"))
    student = [*sample_stopped(trainer, prompts, seed), sample_student(output / "student", prompts, seed)]

    cells = [[row.name, *_cells(row, curve)] for row in (*teacher, *student)]
    table = markdown_table(HEADER, cells)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    shown = [row for row in (*teacher, *student) if row.name not in ("teacher, 8 steps", "teacher, 16 steps")]
    real = ("real digits", _one_per_digit(digits.heldout_images()))
    rows = [(row.name.replace(", ", ",\n"), row.images[:10]) for row in shown]  # few and large: read on a phone, too
    image_grid([real, *rows], output / "grid.png")
    print(f"\n{table}\n\nwrote {output / 'grid.png'} and {output / 'student'} in {time.perf_counter() - started:.0f} s")
    return {row.name: row.figures for row in (*teacher, *student)}


def sample_teacher(prompts: Sequence[str], seed: int, num_steps: int) -> Row:
    """Sample the teacher in steps of equal size, which is the student's grid: 1, 3/4, 1/2, 1/4 for four.

    The scheduler's own grid ends next to zero, and its last step does nothing.
    """
    pipeline = _quiet(DiffusionPipeline.from_pretrained(digits.teacher_path()))
    grid = [(num_steps - k) / num_steps for k in range(num_steps)]
    name = f"teacher, {num_steps} step{'s' if num_steps > 1 else ''}"
    return _sampled(name, pipeline, prompts, seed, num_inference_steps=num_steps, sigmas=grid, guidance_scale=GUIDANCE)


def sample_student(folder: Path, prompts: Sequence[str], seed: int) -> Row:
    """Sample the exported student with plain diffusers."""
    pipeline = _quiet(DiffusionPipeline.from_pretrained(digits.teacher_path()))
    pipeline.load_lora_weights(str(folder))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    name, call = f"student, {STUDENT_STEPS} steps", {"num_inference_steps": STUDENT_STEPS, "guidance_scale": 1.0}
    return _sampled(name, pipeline, prompts, seed, **call)


def sample_stopped(trainer: RDMTrainer, prompts: Sequence[str], seed: int) -> list[Row]:
    """Sample the same student, stopped after each evaluation before its last."""
    begin = time.perf_counter()
    starts = range(0, len(prompts), BATCH)
    batches = [trainer.sample_each_step(prompts[i : i + BATCH], seed=seed + i) for i in starts]
    each = (time.perf_counter() - begin) / STUDENT_STEPS
    return [
        _measured(f"student, stopped after {k}", torch.cat([batch[k - 1] for batch in batches]), prompts, k * each)
        for k in range(1, STUDENT_STEPS)
    ]


@torch.no_grad()
def sample(pipeline: Any, prompts: Sequence[str], seed: int, **call: Any) -> Tensor:
    """Sample a plain diffusers pipeline in batches: images `[N, 3, 32, 32]` in [0, 1], the same for the same seed.

    Every batch has a seed of its own, the one that `sample_stopped` gives it: all rows of the table begin with the same
    noise. Of 1,000 images, other noise moves FID-SD by more than most rows differ.
    """
    batches = []
    for start in range(0, len(prompts), BATCH):
        torch.manual_seed(seed + start)
        batches.append(pipeline(list(prompts[start : start + BATCH]), **CALL, **call).images)
    return torch.cat(batches)


def _sampled(name: str, pipeline: Any, prompts: Sequence[str], seed: int, **call: Any) -> Row:
    print(f"sampling {len(prompts)} images: {name} ...", flush=True)
    begin = time.perf_counter()
    images = sample(pipeline, prompts, seed, **call)
    return _measured(name, images, prompts, time.perf_counter() - begin)


def _measured(name: str, images: Tensor, prompts: Sequence[str], seconds: float) -> Row:
    figures = {
        "FID-SD": frechet_distance(images, teacher_statistics()),
        "FID to real digits": frechet_distance(images, digits.heldout_images()),
        "diversity": diversity(images, prompts),
        "legibility": legibility(images, prompts),
        "ms / image": 1000 * seconds / len(prompts),
    }
    return Row(name, images, figures)


def _cells(row: Row, teacher: dict[int, float]) -> list[object]:
    """Return a row of the table behind its name."""
    fidelity, *others = row.figures.values()
    worth = "" if row.name.startswith("teacher") else teacher_steps_worth(fidelity, teacher)
    return [fidelity, worth, *others]


def _one_per_digit(real: Tensor) -> Tensor:
    """Return ten real digits in the order of the prompts, 0 to 9."""
    labels = digits.heldout_labels()
    return real[torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])]


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
