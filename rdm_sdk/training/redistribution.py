"""Stored rollouts of a run that goes on with another number of processes: put together, and shared out anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rdm_sdk.errors import CheckpointError
from rdm_sdk.rewards.evaluate import merged
from rdm_sdk.training.rollouts import read_rollouts, rollouts_path
from rdm_sdk.types import Experience, RewardOutput, Rollout, select_steps


def read_share(folder: str | Path, before: int, index: int, count: int, device: torch.device) -> list[Experience]:
    """Return the stored rollouts that process `index` of `count` goes on with.

    Args:
        folder: a checkpoint, in which every one of the `before` processes that wrote it has left its rollouts.
        before: how many these were.
        index: of this process, from 0.
        count: how many there are now.
        device: where the tensors go.

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
    return [_part(_together(parts), index, count, device) for parts in zip(*shares, strict=True)]


def _together(parts: Sequence[Experience]) -> Experience:
    """Return the micro-batch of all processes whose shares are given in their order."""
    first = parts[0]
    labels = list(dict.fromkeys(label for part in parts for label in part.scored))
    return Experience(
        prompts=[prompt for part in parts for prompt in part.prompts],
        columns={},
        condition={},
        rollout=Rollout(
            states=torch.cat([part.rollout.states for part in parts], 1),
            x_0=torch.cat([part.rollout.x_0 for part in parts], 1),
            depths=torch.cat([part.rollout.depths for part in parts]),
        ),
        plan=first.plan,
        use=first.use,
        x_0=torch.cat([part.x_0 for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        scored={label: merged([_output(part, label) for part in parts]) for label in labels},
    )


def _output(part: Experience, label: str) -> RewardOutput:
    """Return what a reward said, NaN where the process that had these samples has skipped it."""
    return part.scored[label] if label in part.scored else RewardOutput(torch.full_like(part.weights, torch.nan))


def _moved(output: RewardOutput, device: torch.device) -> RewardOutput:
    """Return what a scored reward said, on a device."""
    logged = {name: values.to(device) for name, values in output.logged.items()}
    return RewardOutput(output.scores.to(device), logged=logged)


def _part(whole: Experience, index: int, count: int, device: torch.device) -> Experience:
    """Return what process `index` of `count` has of a micro-batch of all processes."""
    size = len(whole.prompts) // count
    share = slice(index * size, (index + 1) * size)
    rollout = Rollout(
        states=whole.rollout.states[:, share].to(device),
        x_0=whole.rollout.x_0[:, share].to(device),
        depths=whole.rollout.depths[share].to(device),
    )
    plan = whole.plan.to(device)
    return Experience(
        prompts=whole.prompts[share],
        columns={},
        condition={},
        rollout=rollout,
        plan=plan,
        use=whole.use,
        x_0=select_steps(rollout.x_0, plan[whole.use, share]),
        weights=whole.weights[share].to(device),
        scored={label: _moved(output.part(share), device) for label, output in whole.scored.items()},
        start=share.start,
    )
