"""Small runs of the tiny pipelines, planned and carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rdm_sdk import RDMConfig, RDMTrainer, plan_memory
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import Meter
from rdm_sdk.planning.plan import MemoryPlan

PROMPTS = ["a handwritten one, drawn with a brush", "a handwritten two, drawn with a pencil"]
SMALL = "small"
"""The folder of a Stable Diffusion 3 of one block."""
CLIP_ONLY = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def settings(kind: str, family: ModelFamily, output_dir: Path, **changed: Any) -> RDMConfig:
    """Return the settings of a small run with a family, two samples for each of the two prompts."""
    unit = family.size_unit
    height = -(-32 // unit) * unit
    given: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "guidance_scale": 1.0 if family.guidance == "none" else 3.0,
        "critic_steps": 1,
        "max_steps": 2,
        "height": height,
        "width": 2 * height,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    given |= {} if kind in CLIP_ONLY else {"max_sequence_length": 24}
    return RDMConfig(**(given | changed))


def moving(plan: MemoryPlan) -> int:
    """Return the bytes that a run makes itself: all but the weights that it is given."""
    rows = ("optimizer", "gradients", "activations", "moving average")
    return sum(row.bytes or 0 for row in plan.rows if row.role in rows)


def run_under_meter(folder: Path, rewards: Any, args: RDMConfig, **loras: Any) -> tuple[RDMTrainer, int]:
    """Train, and return the trainer and the most bytes that were alive at once of what training made."""
    trainer = RDMTrainer(str(folder), rewards, args, PROMPTS, **loras)
    trainer.models.encode([*PROMPTS, None])  # encoders take nothing between uses
    with Meter() as meter:
        trainer.train()
    average = [] if trainer.models.ema is None else trainer.models.ema.shadow_params  # the constructor made it
    return trainer, meter.peak + sum(4 * parameter.numel() for parameter in average)


_PLANS: dict[str, MemoryPlan] = {}


def plan_of(
    folders: Path, tmp_path: Path, rewards: Any = "dm", lora: Any = None, kind: str = SMALL, **changed: Any
) -> MemoryPlan:
    """Return the plan of a small run with a Stable Diffusion 3; one that was made before, as it was made."""
    configs, key = folders / "configs" / kind, repr((kind, rewards, lora, changed))
    if key not in _PLANS:
        args = settings(kind, blueprint(configs, torch.float32), tmp_path, **changed)
        _PLANS[key] = plan_memory(configs, args, rewards, lora)
    return _PLANS[key]
