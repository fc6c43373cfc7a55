"""Every recipe under `examples/recipes/` runs, on a tiny random pipeline of its base's class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pipeline_calls import size_of
from tiny_pipelines import (
    tiny_flux,
    tiny_flux2,
    tiny_pixart,
    tiny_qwen_image,
    tiny_sana,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from true_shapes import write_configs

from rdm_sdk import RDMConfig, RDMTrainer, digits
from rdm_sdk.cli.main import main
from rdm_sdk.cli.run_arguments import parse_run
from rdm_sdk.families.load import load_family
from rdm_sdk.rewards.resolve import plan_rewards

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
BASES: dict[str, Callable[[], Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_sd,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny_sdxl,
    "stabilityai/stable-diffusion-3.5-medium": tiny_sd3,
    "stabilityai/stable-diffusion-3-medium-diffusers": tiny_sd3,
    "black-forest-labs/FLUX.1-dev": tiny_flux,
    "black-forest-labs/FLUX.2-klein-base-9B": tiny_flux2,
    "Qwen/Qwen-Image": tiny_qwen_image,
    "Tongyi-MAI/Z-Image": tiny_z_image,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": tiny_sana,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": tiny_pixart,
    "digits": digits.teacher_path,
}
WITH_HUB_WEIGHTS = {"aesthetic", "hps", "clip", "pickscore"}
SMALL: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "gradient_accumulation_steps": 1,
    "bf16": False,  # the tiny pipelines are float32, and `bf16` is what casts a base that is loaded by its name
    "quantization": "none",
    "save_strategy": "no",
    "log_images": 0,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def test_there_are_recipes_for_every_family() -> None:
    """Each is one of a base that is known here."""
    assert len(RECIPES) >= 10
    used = {parse_run("train", "", ["--config", str(path), "--use_cpu"])[0].arguments.model for path in RECIPES}
    assert used == BASES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path: Path, tmp_path: Path) -> None:
    """Its settings and rewards are read as `train` reads them, and a step is taken, with less of everything.

    In the place of rewards whose weights are on the hub stands `jpeg`, at their weight.
    """
    text = path.read_text()
    assert f"--config examples/recipes/{path.name}" in text
    assert "Not run on published weights" in text or "Run on two CPU cores" in text
    given, _ = parse_run("train", "", ["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path / "run")])
    planned = plan_rewards(given.arguments.rewards, None, given.config.reward_route)
    rewards = {}
    for reward in planned:
        name = "jpeg" if reward.term.name in WITH_HUB_WEIGHTS else reward.term.reference
        rewards[name] = max(rewards.get(name, 0.0), reward.weight)
    base = BASES[str(given.arguments.model)]()
    pipeline = base if isinstance(base, str) else load_family(base, torch.float32)
    settings = {f.name: getattr(given.config, f.name) for f in fields(RDMConfig) if f.init}
    changed = {f.name: settings[f.name] for f in fields(RDMConfig) if f.init and settings[f.name] != f.default}
    method = {name: value for name, value in changed.items() if name in RDMConfig.__annotations__}
    size = {} if isinstance(base, str) else size_of(pipeline)
    args = RDMConfig(**(method | SMALL | size | {"output_dir": str(tmp_path / "run")}))
    lora = LoraConfig(r=4, lora_alpha=4)
    student, critic = (None if kind == "full" else lora for kind in (args.student_weights, args.critic_weights))
    prompts = [f'a sign that says "{word}"' for word in ("one", "two")] if "ocr" in rewards else digits.prompts()
    trainer = RDMTrainer(pipeline, rewards, args, prompts, peft_config=student, fake_peft_config=critic)
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "inference.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("recipe", "kind"), [("sdxl-hps", "StableDiffusionXLPipeline"), ("flux1-dev-4bit", "FluxPipeline")]
)
def test_a_recipe_for_a_card_of_24_gb_fits_there(recipe: str, kind: str, tmp_path: Path) -> None:
    """By the plan, at the published size; a recipe whose title names a card must be possible on it."""
    (path,) = [path for path in RECIPES if path.stem == recipe]
    assert "24 GB card" in path.read_text().splitlines()[0]
    configs = write_configs(tmp_path / "base", kind)
    assert main(["plan", "--config", str(path), "--model", configs, "--memory", "24"]) == 0
