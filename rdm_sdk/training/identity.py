"""What makes a run the run it is: what may change when it is resumed, and what would make it another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from datasets import Dataset, LargeList, List, Value
from transformers import TrainingArguments

from rdm_sdk.errors import CheckpointError
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.optimizers import OF_CRITICS

RATES = frozenset(
    {
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "weight_decay", "max_grad_norm"),
        *(f"critic_{name}" for name in OF_CRITICS),
        *("critic_max_grad_norm", "reward_weights"),
    }
)
"""Settings that a resumed run may change; what it had before is said, and the new ones count."""
PLACES = frozenset(
    {
        *("reward_batch_size", "reward_device", "reward_offload", "reward_on_error", "log_images"),
        *("log_images_limit", "log_images_filter", "reward_timeout", "watch", "eval_rewards"),
        *("text_encoders", "prompt_cache", "vae_offload", "vae_slicing", "vae_tiling"),
    }
)
"""Settings of the method that change where and when things are computed, not what."""
START = "start_from"
"""A folder whose weights a checkpoint has taken over, so that a resumed run may find it elsewhere; it is said."""
FIXED_BY_TRANSFORMERS = frozenset(
    {"seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "optim"}
)
"""Settings of transformers that make another run. All others but `RATES` are about logging, saving and hardware."""

MICRO_BATCH = "per_device_train_batch_size * processes"


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to."""

    run: str
    """Drawn when the run begins, and kept when it is resumed."""
    base: str
    """The base model's fingerprint."""
    prompts: str
    """Hash of the training prompts, and of what rewards read beside them."""
    processes: int
    settings: dict[str, Any]
    """See `run_settings`."""


def run_settings(args: RDMConfig) -> dict[str, Any]:
    """Return what a checkpoint keeps of a run's settings, as JSON gives it back."""
    inherited = {field.name for field in fields(TrainingArguments)}
    names = {f.name for f in fields(args) if f.name not in inherited} - PLACES | RATES | FIXED_BY_TRANSFORMERS
    content: dict[str, Any] = args.to_dict()  # type: ignore[no-untyped-call] # with plain values in the place of enums
    kept: dict[str, Any] = json.loads(json.dumps({name: content[name] for name in sorted(names)}))
    # Who has which sample is no matter: two processes of 4 are one of 8.
    kept[MICRO_BATCH] = kept.pop("per_device_train_batch_size") * args.world_size
    return kept


def prompts_digest(dataset: Dataset | None, columns: Iterable[str] = ()) -> str:
    """Return a hash of a dataset's prompts, in their order, and of those `columns` of it that hold texts and numbers.

    Pictures would all have to be read for it, and a transform may make other entries each time.
    """
    digest = hashlib.sha256()
    for prompt in dataset["prompt"] if dataset is not None else ():
        digest.update(json.dumps(prompt).encode())
    if dataset is not None and dataset.format["type"] != "custom":
        for name in sorted({*columns} & {*dataset.column_names}):
            if _is_plain(dataset.features[name]):
                digest.update(json.dumps(name).encode())
                for entry in dataset[name]:
                    digest.update(json.dumps(entry, default=str).encode())
    return digest.hexdigest()[:16]


def _is_plain(kind: Any) -> bool:
    """Return whether a column of this type holds texts, numbers, or lists and mappings of them."""
    if isinstance(kind, Mapping):
        return all(map(_is_plain, kind.values()))
    return isinstance(kind, Value) or (isinstance(kind, (List, LargeList)) and _is_plain(kind.feature))


def check_same_run(before: RunIdentity, now: RunIdentity, folder: str) -> list[str]:
    """Return what a resumed run changes about its settings, each as "name: before -> now".

    Raises:
        CheckpointError: something differs that would make it another run.
    """
    changes = {
        name: f"{name}: {before.settings.get(name)!r} -> {now.settings.get(name)!r}"
        for name in sorted(before.settings.keys() | now.settings.keys())
        if before.settings.get(name) != now.settings.get(name)
    }
    moved = {START} if before.settings.get(START) and now.settings.get(START) else set()
    refused = [change for name, change in changes.items() if name not in RATES | moved]
    if before.prompts != now.prompts:
        refused.append("other prompts or entries of columns that rewards read, or in another order")
    if before.processes != now.processes:
        changes["processes"] = f"number of processes: {before.processes} -> {now.processes}"
    if refused:
        raise CheckpointError(
            f"checkpoint {folder!r} is of another run ({'; '.join(refused)}); resume with the same settings, or begin "
            "a new run in another output_dir. Rates, schedules, logging and saving may change"
        )
    return list(changes.values())
