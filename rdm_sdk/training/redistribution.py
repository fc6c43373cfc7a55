"""Stored rollouts of a run that goes on with another number of processes: put together, and shared out anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rdm_sdk.errors import CheckpointError
from rdm_sdk.rewards.evaluate import merged
from rdm_sdk.training.rollouts import read_rollouts, rollouts_path
from rdm_sdk.types import Experience, RewardOutput, Rollout, select_steps


def read_share(folder: str | Path, before: int, index: int, count: int, device: torch.device) -> list[Experience]:
    """Return the stored rollouts that process `index` of `count` goes on with, of the `before` that wrote a checkpoint.

    Raises:
        CheckpointError: a file is missing.
    """
    paths = [rollouts_path(folder, one) for one in ([index] if before == count else range(before))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"cannot resume from {str(folder)!r}: {path.name} missing")
    if before == count:
        return read_rollouts(paths[0], device)
    shares = [read_rollouts(path, torch.device("cpu")) for path in paths]
    return [_share(parts, index, count, device) for parts in zip(*shares, strict=True)]


def _share(parts: Sequence[Experience], index: int, count: int, device: torch.device) -> Experience:
    """Return what process `index` of `count` has of a micro-batch, of which the processes before had these parts."""
    first, rollouts = parts[0], [part.rollout for part in parts]
    prompts = [prompt for part in parts for prompt in part.prompts]
    size = len(prompts) // count
    rows = slice(index * size, (index + 1) * size)

    def mine(tensors: Iterable[Tensor], samples: int = 0) -> Tensor:
        """Return the rows of tensors whose dimension `samples` counts the samples."""
        return torch.cat(list(tensors), samples).narrow(samples, rows.start, size).to(device)

    rollout = Rollout(
        states=mine((one.states for one in rollouts), samples=1),
        x_0=mine((one.x_0 for one in rollouts), samples=1),
        depths=mine(one.depths for one in rollouts),
    )
    plan = first.plan.to(device)
    scored = {}
    for label in dict.fromkeys(label for part in parts for label in part.scored):
        output = merged([_output(part, label) for part in parts]).part(rows)
        logged = {name: values.to(device) for name, values in output.logged.items()}
        scored[label] = RewardOutput(output.scores.to(device), logged=logged)
    return replace(
        first,
        prompts=prompts[rows],
        rollout=rollout,
        plan=plan,
        x_0=select_steps(rollout.x_0, plan[first.use, rows]),
        weights=mine(part.weights for part in parts),
        scored=scored,
        start=rows.start,
    )


def _output(part: Experience, label: str) -> RewardOutput:
    """Return what a reward said, NaN where the process that had these samples has skipped it."""
    return part.scored[label] if label in part.scored else RewardOutput(torch.full_like(part.weights, torch.nan))
