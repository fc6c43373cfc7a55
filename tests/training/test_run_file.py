"""The file of a run's settings beside its checkpoints repeats the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from digit_runs import Bright, pictures
from peft import LoraConfig

from rdm_sdk import RDMTrainer
from rdm_sdk.cli.run_arguments import Run, parse_run
from rdm_sdk.training.data import load_prompts
from rdm_sdk.training.run_file import write_run_file

Make = Callable[..., RDMTrainer]


def read(path: Path) -> Run:
    """Return the run that the command line makes of a file."""
    return parse_run("train", "", ["--config", str(path)])[0]


@pytest.mark.parametrize(
    ("rewards", "settings", "lora"),
    [
        ("dm", {}, LoraConfig(r=16, lora_alpha=16)),
        (
            "dm + 0.5*jpeg[quality=80] - 0.25*legibility",
            {
                "learning_rate": 3e-5,
                "lr_scheduler_type": "cosine",
                "resolutions": ["32x32", "16x32"],
                "weighting": "fixed[cold_start=2]",
                "reward_route": "tilt[jpeg=advantage]",
                "reward_weights": [1.0, 0.5, 2.0],
                "num_iterations": 2,
                "optim_args": "eps=1e-7",
                "seed": 7,
                "max_grad_norm": 0.5,
                "activation_checkpointing": True,
                "save_strategy": "steps",
                "save_steps": 3,
            },
            LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"]),
        ),
    ],
)
def test_it_makes_the_same_run(
    rewards: str, settings: dict[str, Any], lora: LoraConfig, make_trainer: Make, tmp_path: Path
) -> None:
    """Every setting, the rewards at their weights, the adapters, the base and the prompts in their order."""
    trainer = make_trainer(tmp_path, rewards, ["a zero", 'a "one", é\nin two lines'], peft_config=lora, **settings)
    run = read(write_run_file(trainer, tmp_path))
    ours, theirs = trainer.args.to_dict(), run.config.to_dict()
    assert {n for n in ours if ours[n] != theirs[n]} - {"reward_weights"} == set()
    made = RDMTrainer(
        run.model,
        run.arguments.rewards,
        run.config,
        run.prompts,
        peft_config=run.loras[0],
        fake_peft_config=run.loras[1],
    )
    assert [(r.term, r.weight, r.route) for r in made.rewards] == [(r.term, r.weight, r.route) for r in trainer.rewards]
    assert made.family.fingerprint() == trainer.family.fingerprint()
    for role in trainer.roles.trainable_roles:
        assert made.roles.describe(role) == trainer.roles.describe(role)
        assert made.roles.lora_config(role).target_modules == trainer.roles.lora_config(role).target_modules
    assert load_prompts(run.prompts)["prompt"] == trainer.train_dataset["prompt"]
    assert "Missing" not in (tmp_path / "run.yaml").read_text(encoding="utf-8")


def test_training_writes_it_without_secrets(make_trainer: Make, tmp_path: Path) -> None:
    """And names each thing that a file cannot hold."""
    trainer = make_trainer(
        tmp_path,
        [("dm", 1.0), (Bright(), 0.0)],
        pictures(),
        hub_token="hf_secret",
        eval_dataset=["a zero"],
        peft_config=LoraConfig(r=4, lora_alpha=8, use_rslora=True),
        max_steps=1,
    )
    trainer.train()
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert "hf_secret" not in text
    for missing in ("hub_token, a secret", "'bright', an object", "evaluation", "--prompts", "rslora True"):
        assert missing in text
    assert "prompts" not in yaml.safe_load(text)
    assert not (tmp_path / "prompts.jsonl").exists()
