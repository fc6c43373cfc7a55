"""The settings of a run as a file beside its checkpoints, which repeats it: `rdm-sdk train --config run.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import Dataset, Value
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState

from rdm_sdk.errors import RDMError
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.files import replacing
from rdm_sdk.rewards.resolve import plan_rewards
from rdm_sdk.rewards.spec import is_secret, show_spec
from rdm_sdk.training.inherited import chosen_settings
from rdm_sdk.training.weighting import make_weighting

if TYPE_CHECKING:
    from rdm_sdk.training.trainer import RDMTrainer

FILE, PROMPTS = "run.yaml", "prompts.jsonl"
_EVALUATION = ("eval_", "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "per_device_eval")
"""Beginnings of the settings that need an `eval_dataset`, which the command line does not take."""


class RunFile(TrainerCallback):
    """Writes `run.yaml` and `prompts.jsonl` into the output folder when training begins."""

    def __init__(self, trainer: RDMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.should_save:
            write_run_file(self.trainer, Path(str(args.output_dir)))


def write_run_file(trainer: RDMTrainer, folder: Path) -> Path:
    """Write a trainer's run as YAML for `rdm-sdk train --config`, and its prompts; return the YAML's path.

    Secrets are left out. What a file cannot hold (objects, pictures beside prompts, prompts to evaluate with) is named
    in its head.
    """
    content, missing = settings_of(trainer)
    dataset = trainer.train_dataset
    if dataset is not None and _is_plain(dataset):
        with replacing(folder / PROMPTS) as staged, staged.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset)
        content["prompts"] = str(folder / PROMPTS)
    else:
        missing.append("prompts (their columns are no texts and numbers): give the file with --prompts")
    head = [f"# The settings of a run, to repeat it: rdm-sdk train --config {folder / FILE} --output_dir elsewhere"]
    if missing:
        head += ["# A file cannot hold all of it. Missing here, so that the command makes another run:"]
        head += [f"# - {part}" for part in missing]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with replacing(folder / FILE) as staged:
        staged.write_text("\n".join([*head, text]), encoding="utf-8")
    return folder / FILE


def settings_of(trainer: RDMTrainer) -> tuple[dict[str, Any], list[str]]:
    """Return a run's settings by the names that the command line has for them, and what it has no name for."""
    args, missing = trainer.args, []
    content: dict[str, Any] = {
        "model": trainer.family.base_name,
        "rewards": show_spec([reward.term for reward in trainer.rewards]),
    }
    for reward in trainer.rewards:
        try:
            plan_rewards(reward.term)
        except RDMError:
            missing.append(f"the reward {reward.label!r}, an object in Python; publish it as a plugin to name it here")
    lora, inexpressible = _lora(trainer)
    missing += inexpressible
    if type(trainer.weighting) is not type(make_weighting(args.weighting)):
        missing.append(f"the weighting, an object in Python: {type(trainer.weighting).__name__}")
    if trainer.eval_dataset is not None:
        missing.append("the evaluation while it trains: its prompts and the settings of eval_...")
    # The factors of reward_weights are in the spec's weights already.
    chosen = {n: v for n, v in chosen_settings(args).items() if n != "reward_weights" and not n.startswith(_EVALUATION)}
    secrets = [name for name in chosen if is_secret(name)]
    missing += [f"{name}, a secret" for name in secrets]
    return content | lora | {name: value for name, value in chosen.items() if name not in secrets}, missing


def _lora(trainer: RDMTrainer) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of the adapters, and what of them the command line has no name for."""
    roles = trainer.roles
    configs = {role: roles.lora_config(role) for role in roles.trainable_roles if _is_adapter(trainer, role)}
    if not configs:
        return {}, []
    config = configs.get(STUDENT, next(iter(configs.values())))
    targets = sorted(config.target_modules or ())
    usual = sorted(trainer.family.lora_targets) == targets
    content: dict[str, Any] = {"lora_r": config.r, "lora_alpha": config.lora_alpha}
    content |= {} if usual else {"lora_target_modules": targets}
    plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=targets)
    missing = [
        f"LoRA settings of {role!r}: {roles.describe(role)}" for role in configs if _unlike(configs[role], plain)
    ]
    return content, missing


def _is_adapter(trainer: RDMTrainer, role: str) -> bool:
    return role not in trainer.roles.copies and role not in trainer.roles.heads


def _unlike(config: LoraConfig, other: LoraConfig) -> bool:
    """Return whether two LoRA configurations differ in more than where they come from."""
    places = {"base_model_name_or_path", "task_type", "auto_mapping", "revision", "peft_version", "inference_mode"}
    one, two = (
        {name: value for name, value in vars(given).items() if name not in places and not name.startswith("_")}
        for given in (config, other)
    )
    for given in (one, two):
        given["target_modules"] = sorted(given["target_modules"] or ())
    return one != two


def _is_plain(dataset: Dataset) -> bool:
    """Return whether every column holds texts or numbers."""
    return all(isinstance(kind, Value) for kind in dataset.features.values())
