"""The settings of a run as a file beside its checkpoints, which repeats it: `rdm-sdk train --config run.yaml`."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import Dataset, Value
from peft import LoraConfig

from rdm_sdk.errors import RDMError
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.families.targets import names_of_adapted
from rdm_sdk.files import replacing, sha256_of
from rdm_sdk.rewards.callables import CallableReward
from rdm_sdk.rewards.resolve import target_of
from rdm_sdk.rewards.spec import is_secret, show_spec
from rdm_sdk.training.inherited import chosen_settings
from rdm_sdk.training.own_files import NO_PROMPTS, places, sealed
from rdm_sdk.training.student_base import source_of
from rdm_sdk.training.weighting import make_weighting

if TYPE_CHECKING:
    from rdm_sdk.families.roles import Roles
    from rdm_sdk.training.trainer import RDMTrainer

_EVALUATION = ("eval_", "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "per_device_eval")
"""Beginnings of the settings that need an `eval_dataset`, which the command line does not take."""
_NOT_THE_RUN = ("reward_weights", "resume_from_checkpoint")
"""What is left out: factors that are in the spec's weights already, and where this start went on from."""
_WRITABLE = re.compile(r"(large_)?string|bool|null|u?int\d+|float\d+")
"""The types of columns that come back from JSON as they were."""


def write_run_file(trainer: RDMTrainer, folder: Path) -> Path:
    """Write a trainer's run as YAML for `rdm-sdk train --config`, and its prompts; return the YAML's path.

    Secrets are left out. What a file cannot hold (objects, pictures beside prompts, prompts to evaluate with) is named
    in its head. Files of these names that somebody wrote or changed stay: see `own_files.places`.
    """
    content, missing = settings_of(trainer)
    settings, prompts = places(folder)
    unwritable = _unwritable(trainer.train_dataset)
    digest = NO_PROMPTS
    with ExitStack() as staging:  # so that both take their places, or none does where the disk is full
        if trainer.train_dataset is None or unwritable:
            missing.append(f"prompts{unwritable and f' ({unwritable})'}: give the file with --prompts")
        else:
            digest = _write_prompts(trainer.train_dataset, staging.enter_context(replacing(prompts)))
            content["prompts"] = str(prompts)
        head = [f"# The settings of a run, to repeat it: rdm-sdk train --config {settings} --output_dir elsewhere"]
        if missing:
            head += ["# A file cannot hold all of it. Missing here, so that the command makes another run:"]
            head += [f"# - {part}" for part in missing]
        text = "\n".join([*head, yaml.safe_dump(content, sort_keys=False, allow_unicode=True)])
        staging.enter_context(replacing(settings)).write_text(sealed(text, digest), encoding="utf-8")
    if digest == NO_PROMPTS:
        prompts.unlink(missing_ok=True)  # those of an earlier run, unchanged
    return settings


def settings_of(trainer: RDMTrainer) -> tuple[dict[str, Any], list[str]]:
    """Return a run's settings by the names that the command line has for them, and what it has no name for."""
    args, missing, source = trainer.args, [], source_of(trainer.family.pipeline)
    content: dict[str, Any] = {"rewards": show_spec([reward.term for reward in trainer.rewards])}
    if source is None:
        missing.append(
            f"the base, a {type(trainer.family.pipeline).__name__} that was put together or changed in memory: save it "
            "with save_pretrained(), and give the folder with --model"
        )
    else:
        content = {"model": source} | content
    for reward in trainer.rewards:
        made = reward.reward
        try:
            known = target_of(reward.term) is (made.function if isinstance(made, CallableReward) else type(made))
        except RDMError:
            known = False
        if not known:
            missing.append(f"the reward {reward.label!r}, an object in Python; publish it as a plugin to name it here")
    lora, inexpressible = _lora(trainer)
    missing += inexpressible
    if type(trainer.weighting) is not type(make_weighting(args.weighting)):
        missing.append(f"the weighting, an object in Python: {type(trainer.weighting).__name__}")
    if trainer.eval_dataset is not None:
        missing.append("the evaluation while it trains: its prompts and the settings of eval_...")
    chosen = {n: v for n, v in chosen_settings(args).items() if n not in _NOT_THE_RUN and not n.startswith(_EVALUATION)}
    secrets = [name for name in chosen if is_secret(name)]
    missing += [f"{name}, a secret" for name in secrets]
    return content | lora | {name: value for name, value in chosen.items() if name not in secrets}, missing


def _lora(trainer: RDMTrainer) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of the adapters, and what of them the command line has no name for."""
    roles = trainer.roles
    adapters = [role for role in roles.trainable_roles if role not in roles.copies and role not in roles.heads]
    if not adapters:
        return {}, []
    first = STUDENT if STUDENT in adapters else adapters[0]
    config, targets = roles.lora_config(first), _targets(roles, first)
    content: dict[str, Any] = {}
    missing: list[str] = []
    if trainer.args.start_from is not None and first == STUDENT:
        common = _comparable(config, targets)  # the command takes it from there, and for critics too
    else:
        content = {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        common = _comparable(LoraConfig(r=config.r, lora_alpha=config.lora_alpha), targets)
        if isinstance(targets, str):
            missing.append(f"lora_target_modules, which names alone cannot say: {targets!r}")
        elif targets != sorted(trainer.family.lora_targets):
            content["lora_target_modules"] = targets
    missing += [
        f"LoRA settings of {role!r}: {roles.describe(role)}"
        for role in adapters
        if _comparable(roles.lora_config(role), _targets(roles, role)) != common
    ]
    return content, missing


def _targets(roles: Roles, role: str) -> list[str] | str:
    """Return the layers that a role's adapters are for, by name; a regular expression where no names say the same."""
    given = roles.lora_config(role).target_modules
    if isinstance(given, str):
        return names_of_adapted(roles.backbone, role) or given
    return sorted(given or ())


def _comparable(config: LoraConfig, targets: list[str] | str) -> dict[str, Any]:
    """Return what a LoRA configuration says beside where it comes from, with the layers that it is for."""
    places = {"base_model_name_or_path", "task_type", "auto_mapping", "revision", "peft_version", "inference_mode"}
    kept = {name: value for name, value in vars(config).items() if name not in places and not name.startswith("_")}
    return kept | {"target_modules": targets}


def _unwritable(dataset: Dataset | None) -> str:
    """Return why a line of JSON cannot hold a row of a dataset as it is; nothing where it can."""
    if dataset is None:
        return ""
    if dataset.format["type"] == "custom":
        return "a transform makes them"
    odd = [
        f"{name!r} of type {kind.dtype if isinstance(kind, Value) else type(kind).__name__}"
        for name, kind in dataset.features.items()
        if name in dataset.format["columns"] and not (isinstance(kind, Value) and _WRITABLE.fullmatch(kind.dtype))
    ]
    return f"no text or number: the column {', '.join(odd)}" if odd else ""


def _write_prompts(dataset: Dataset, path: Path) -> str:
    """Write a dataset's rows as lines of JSON; return the hash of the file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in dataset.with_format(None, columns=dataset.format["columns"]):  # no tensors
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sha256_of(path)
