"""The demo: distill the embedded digits teacher into a 4-step student, with the public API and plain diffusers only."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    frechet_distance,
    image_grid,
    legibility,
    markdown_table,
    teacher_statistics,
)

GUIDANCE = 1.0
CALL = {"max_sequence_length": 4, "output_type": "pt"}  # the digits teacher needs no more text tokens
# A small model needs adapters on its feed-forward layers too, to learn four steps from forty.
LORA_TARGETS = (
    r".*\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|ff\.net\.0\.proj|ff\.net\.2)"
)
HEADER = ("", "FID to real digits", "FID-SD", "legibility", "ms / image")


def demo_config(output: Path, steps: int, seed: int) -> RDMConfig:
    """Return the settings that distill the digits teacher in under two minutes on two CPU cores."""
    return RDMConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=8,
        guidance_scale=GUIDANCE,
        max_sequence_length=4,
        learning_rate=4e-4,
        critic_learning_rate=1e-3,
        ema_decay=0.98,
        log_images=max(1, steps // 4),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        seed=seed,
    )


def run_demo(output: Path, steps: int = 100, num_samples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train, export, reload into plain diffusers, measure; prints a table and writes `grid.png` and `table.md`.

    Returns:
        For "teacher, 40 steps", "teacher, 4 steps" and "student, 4 steps": the table's figures by column.
    """
    started = time.perf_counter()
    teacher = _quiet(DiffusionPipeline.from_pretrained(digits.teacher_path()))
    prompts = digits.prompts() * (num_samples // 10)
    images: dict[str, Tensor] = {}
    milliseconds: dict[str, float] = {}

    def measure(name: str, pipeline: Any, num_steps: int, guidance_scale: float) -> None:
        print(f"sampling {len(prompts)} images: {name} ...", flush=True)
        begin = time.perf_counter()
        images[name] = sample(pipeline, prompts, seed, num_steps, guidance_scale)
        milliseconds[name] = (time.perf_counter() - begin) * 1000 / len(prompts)

    measure("teacher, 40 steps", teacher, 40, GUIDANCE)
    measure("teacher, 4 steps", teacher, 4, GUIDANCE)

    print(f"distilling: {steps} steps, pictures in {output / 'training' / 'images'}", flush=True)
    trainer = RDMTrainer(
        model=digits.teacher_path(),
        reward_funcs="dm",
        args=demo_config(output / "training", steps, seed),
        train_dataset=digits.prompts(),
        peft_config=LoraConfig(r=64, lora_alpha=64, target_modules=LORA_TARGETS),
    )
    trainer.train()
    trainer.save_model(str(output / "student"))

    student = _quiet(DiffusionPipeline.from_pretrained(digits.teacher_path()))
    student.load_lora_weights(str(output / "student"))
    student.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(output / "student", subfolder="scheduler")
    measure("student, 4 steps", student, 4, 1.0)

    real, reference = digits.heldout_images(), teacher_statistics()
    figures = {
        name: {
            "FID to real digits": frechet_distance(batch, real),
            "FID-SD": frechet_distance(batch, reference),
            "legibility": legibility(batch, prompts),
            "ms / image": milliseconds[name],
        }
        for name, batch in images.items()
    }
    table = markdown_table(HEADER, [[name, *row.values()] for name, row in figures.items()])
    image_grid(
        [("real digits", _one_per_digit(real)), *((n, b[:20]) for n, b in images.items())], output / "grid.png", 2
    )
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwrote {output / 'grid.png'} and {output / 'student'} in {time.perf_counter() - started:.0f} s")
    return figures


@torch.no_grad()
def sample(pipeline: Any, prompts: Sequence[str], seed: int, num_steps: int, guidance_scale: float) -> Tensor:
    """Sample a plain diffusers pipeline in batches: images `[N, 3, 32, 32]` in [0, 1], the same for the same seed."""
    torch.manual_seed(seed)
    batches = [
        pipeline(
            list(prompts[i : i + 250]), num_inference_steps=num_steps, guidance_scale=guidance_scale, **CALL
        ).images
        for i in range(0, len(prompts), 250)
    ]
    return torch.cat(batches)


def _one_per_digit(real: Tensor) -> Tensor:
    """Return twenty real digits in the order of the prompts, 0 to 9 twice."""
    labels = digits.heldout_labels()
    rows = [(labels == digit).nonzero()[:2, 0] for digit in range(10)]
    return real[torch.stack(rows, dim=1).flatten()]


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
