"""Rollouts that outlive an optimizer step, in a checkpoint: one safetensors file per process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rdm_sdk.types import Experience, RewardOutput, Rollout, select_steps

_FIELDS = ("plan", "weights")
_TRAJECTORY = ("states", "x_0", "depths")


def rollouts_path(checkpoint: str | Path, process_index: int) -> Path:
    """Return where a checkpoint keeps a process's rollouts."""
    return Path(checkpoint) / f"rdm_rollouts_{process_index}.safetensors"


def write_rollouts(path: Path, stored: Sequence[Sequence[Experience]]) -> None:
    """Write experiences, per optimizer step, without what the next use brings back: encodings, columns and x_0.

    Nothing to write, no file.
    """
    experiences = [own for together in stored for own in together]
    if not experiences:
        return
    tensors: dict[str, Tensor] = {}
    for i, own in enumerate(experiences):
        tensors |= {f"{i}.{name}": getattr(own, name) for name in _FIELDS}
        tensors |= {f"{i}.rollout.{name}": getattr(own.rollout, name) for name in _TRAJECTORY}
        tensors |= {f"{i}.scored.{name}": output.scores for name, output in own.scored.items()}
    metadata = {
        "prompts": json.dumps([own.prompts for own in experiences]),
        "uses": json.dumps([own.use for own in experiences]),
        "scored": json.dumps([list(own.scored) for own in experiences]),
        "sizes": json.dumps([len(together) for together in stored]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, staged, metadata)
    staged.replace(path)


def read_rollouts(path: Path, device: torch.device) -> list[list[Experience]]:
    """Return what `write_rollouts` wrote, none where there is no file; encodings and columns are empty."""
    if not path.is_file():
        return []
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    prompts, uses = json.loads(metadata["prompts"]), json.loads(metadata["uses"])
    experiences = []
    scores = json.loads(metadata["scored"])
    for i, (texts, use, names) in enumerate(zip(prompts, uses, scores, strict=True)):
        rollout = Rollout(**{name: tensors[f"{i}.rollout.{name}"] for name in _TRAJECTORY})
        prefix = f"{i}.scored."
        scored = {name: RewardOutput(tensors[prefix + name]) for name in names}
        plan = tensors[f"{i}.plan"]
        x_0 = select_steps(rollout.x_0, plan[use])
        experiences.append(Experience(texts, {}, {}, rollout, plan, use, x_0, tensors[f"{i}.weights"], scored))
    remaining = iter(experiences)
    return [list(islice(remaining, size)) for size in json.loads(metadata["sizes"])]
