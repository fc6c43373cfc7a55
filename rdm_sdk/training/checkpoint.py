"""Training state beyond what Trainer saves: the roles' weights, the moving average and the counters.

A checkpoint folder is an export (see `export.py`) plus Trainer's own files plus `rdm_state.safetensors`,
`rdm_state.json` and, where there are critics, `critic_optimizer.pt`; `checkpoint_folders.py` says when it is whole. On
resume all of it is checked before anything is loaded.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from rdm_sdk.errors import CheckpointError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import AVERAGE
from rdm_sdk.rewards.base import public_options
from rdm_sdk.training.checkpoint_folders import newest_whole, verify
from rdm_sdk.training.identity import RunIdentity, check_same_run
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.randomness import global_state, set_global_state
from rdm_sdk.training.redistribution import read_share
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.training.weighting import state_of, weigh

logger = logging.getLogger(__name__)

FORMAT = 8
WEIGHTS, STATE = "rdm_state.safetensors", "rdm_state.json"
TRAINER_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
CRITIC_OPTIMIZER = "critic_optimizer.pt"
RANDOM = "random"
"""The tensor of the random state, which is the same for any number of processes."""


@dataclass(frozen=True)
class RunState:
    """The part of the training state that is not tensors."""

    identity: RunIdentity
    rewards: list[str]
    """Their names, with the options that their specs give."""
    options: list[dict[str, Any]]
    """All of their options, defaults too, without secrets."""
    routes: list[str]
    """How each of them acts on the student."""
    adapters: dict[str, str]
    """Role to the LoRA settings that its weights only mean something with."""
    forwards: dict[str, int]
    """Network evaluations so far, in samples, per role."""
    costs: dict[str, int]
    """What else the run has cost: rollouts, critic steps, reward calls."""
    stored_rollouts: bool
    """Whether rollouts are still to be used again; they are in a separate file, one per process."""
    targets: list[float]
    """The weight of each of them in its spec."""
    weights: dict[str, float]
    """What each reward weighs in the next optimizer step."""
    strategy: str
    """The class of the weighting strategy."""
    weighting: dict[str, float]
    """Its state."""
    ema_steps: int | None
    """Updates of the moving average so far, None if the run has none."""
    format: int = FORMAT


def capture(step: DistillationStep, models: RunModels, identity: RunIdentity) -> RunState:
    """Return the run state of a step with its models."""
    roles = models.roles
    return RunState(
        identity=identity,
        rewards=[reward.term.reference for reward in step.judge.rewards],
        options=[public_options(reward.reward.config) for reward in step.judge.rewards],
        routes=[reward.route for reward in step.judge.rewards],
        adapters={role: roles.describe(role) for role in roles.trainable_roles},
        forwards=dict(roles.forwards),
        costs=dict(step.monitor.spent),
        stored_rollouts=bool(step.rollouts.stored),
        targets=list(step.targets.values()),
        weights=step.weights,
        strategy=type(step.weighting).__name__,
        weighting=state_of(step.weighting),
        ema_steps=None if models.ema is None else models.ema.optimization_step,
    )


def restore(step: DistillationStep, models: RunModels, state: RunState, folder: Path) -> None:
    """Let a step with its models go on from a checkpoint, whatever number of processes wrote it."""
    before, now = state.identity.processes, step.processes
    if models.ema is not None:
        models.ema.optimization_step = state.ema_steps or 0
    step.rollouts.stored = (
        read_share(folder, before, now.index, now.count, models.device) if state.stored_rollouts else []
    )
    models.roles.forwards.clear()
    # Counted in samples of a process, of which each now has another share; the critics' steps are those of all.
    models.roles.forwards.update({role: count * before // now.count for role, count in state.forwards.items()})
    step.monitor.spent = Counter(
        {name: count if name == "critic_steps" else count * before // now.count for name, count in state.costs.items()}
    )
    step.weighting.load_state_dict(state.weighting)
    step.weights = dict(state.weights)
    if state.targets != list(step.targets.values()) or state.weights.keys() != step.targets.keys():
        # Other weights in the spec, or other names, which are as short as all rewards of the run let them be.
        done = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        step.weights = weigh(step.weighting, step.targets, {}, done)


def chosen(wanted: str | Path | bool | None) -> str | Path | bool:
    """Return what `resume_from_checkpoint` means: a folder, True for the newest whole checkpoint, or False for none."""
    words = {"true": True, "latest": True, "false": False, "none": False}
    return words.get(str(wanted).lower(), wanted or False)


def find(wanted: str | Path | bool | None, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, verified; None where the run starts afresh.

    Args:
        wanted: a folder; or True or "latest", which is the newest whole checkpoint of the output folder, and none where
            there is no checkpoint yet; or None or False.
        output_dir: the run's output folder.

    Raises:
        CheckpointError: the folder is no whole checkpoint, or none of those in the output folder is.
    """
    wanted = chosen(wanted)
    if wanted is False:
        return None
    if wanted is not True:
        folder = Path(wanted).expanduser()
        verify(folder)
        return folder
    newest, skipped = newest_whole(output_dir)
    if newest is None and skipped:
        raise CheckpointError(f"no checkpoint in {str(output_dir)!r} is whole: {'; '.join(skipped)}")
    for reason in skipped:
        logger.warning(f"skipped a checkpoint: {reason}")
    if newest is None:
        logger.warning(f"there is no checkpoint in {str(output_dir)!r} yet, so the run starts afresh")
    else:
        logger.warning(f"going on from {str(newest)!r}")
    return newest


def save_state(directory: Path, step: DistillationStep, models: RunModels, identity: RunIdentity) -> None:
    """Write every role's raw weights, the moving average, the run state and the random state of the run's device."""
    roles, average = models.roles, [] if models.ema is None else models.ema.shadow_params
    tensors = {
        f"{role}.{name}": tensor
        for role in roles.trainable_roles
        for name, tensor in roles.role_state_dict(role).items()
    }
    tensors |= {f"{AVERAGE}.{i}": tensor.detach().cpu().contiguous() for i, tensor in enumerate(average)}
    save_file(tensors | {RANDOM: global_state(models.device)}, directory / WEIGHTS)
    state = capture(step, models, identity)
    (directory / STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def check(directory: str | Path, mine: RunState, index: int) -> RunState:
    """Return the run state of a verified checkpoint that can be read and belongs to the run whose state is `mine`.

    `index` is that of this process, whose share of stored rollouts must be there if the run has any.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of another format, or of a run with another base,
            other rewards, another weighting, or with (without) a moving average.
    """
    folder = Path(directory)
    _check_complete(folder, mine)
    try:
        state = _read(folder, index, mine.identity.processes)
    except (CheckpointError, MemoryError):  # a whole one may be too large for this machine
        raise
    except Exception as error:  # whatever reading a damaged file leads to
        raise CheckpointError(
            f"cannot resume from {str(folder)!r}: it is damaged ({type(error).__name__}: {error}). Use an earlier "
            "checkpoint."
        ) from error
    _check_same_networks(folder, state, mine)
    weighed = zip(mine.rewards, state.targets, mine.targets, strict=True)
    weights = [f"weight of {reward!r}: {before:g} -> {now:g}" for reward, before, now in weighed if before != now]
    for change in [*check_same_run(state.identity, mine.identity, str(folder)), *weights]:
        logger.warning(f"resuming with another {change}")
    if state.strategy != mine.strategy:  # one of the user's own, which no setting names
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was made with the weighting {state.strategy}; this run has {mine.strategy}. "
            "Pass the same one"
        )
    return state


def load_critic_optimizer(directory: Path, device: torch.device) -> dict[str, Any]:
    """Return the state of the critics' optimizer and schedule, on a device."""
    place = "cpu" if device.type == "cpu" else device  # "cpu:0", as accelerate has it, is none that PyTorch knows
    state: dict[str, Any] = torch.load(directory / CRITIC_OPTIMIZER, map_location=place, weights_only=True)
    return state


def _check_complete(folder: Path, mine: RunState) -> None:
    """Raise `CheckpointError` unless the folder has the files of a checkpoint."""
    critics = [CRITIC_OPTIMIZER] if len(mine.adapters) > 1 else []
    missing = [name for name in (*TRAINER_FILES, *critics, WEIGHTS, STATE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"cannot resume from {str(folder)!r}: {', '.join(missing)} missing, so its writing was interrupted (or "
            "save_only_model was set). Use an earlier checkpoint."
        )


def _read(folder: Path, index: int, count: int) -> RunState:
    """Return the run state after trying to read every other file that process `index` of `count` goes on with.

    Raises whatever goes wrong.
    """
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {saved.get('format')}; this version reads {FORMAT}"
        )
    state = RunState(**saved | {"identity": RunIdentity(**saved["identity"])})
    json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, framework="pt"):
        pass
    for name in ("optimizer.pt", "scheduler.pt", CRITIC_OPTIMIZER):
        if (folder / name).is_file():
            torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
    if state.stored_rollouts:
        read_share(folder, state.identity.processes, index, count, torch.device("cpu"))
    return state


def _check_same_networks(folder: Path, state: RunState, mine: RunState) -> None:
    """Raise `CheckpointError` if the checkpoint has other networks or rewards than `mine`."""
    if state.identity.base != mine.identity.base:
        raise CheckpointError(f"checkpoint {str(folder)!r} was made with another base model; pass the same one")
    if (state.rewards, state.routes) != (mine.rewards, mine.routes):
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was made with the rewards {state.rewards} by the routes {state.routes}; this "
            f"run has {mine.rewards} by {mine.routes}. Resume with the same rewards and reward_route"
        )
    for reward, before, now in zip(mine.rewards, state.options, mine.options, strict=True):
        # An option that one of them lacks came or went with a version, which is no other reward yet.
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key]:
                raise CheckpointError(
                    f"the reward {reward!r} of checkpoint {str(folder)!r} had {key}={before[key]!r}; here it has "
                    f"{now[key]!r}. Resume with the same; where neither was asked for, another version of the "
                    "reward's package has another default, and the run needs the one that it was begun with"
                )
    if state.adapters != mine.adapters and state.adapters.keys() == mine.adapters.keys():
        role = next(role for role in mine.adapters if state.adapters[role] != mine.adapters[role])
        raise CheckpointError(
            f"weights of checkpoint {str(folder)!r} do not fit: its {role!r} has {state.adapters[role]}, this run's "
            f"{mine.adapters[role]}; resume with the same ones (weights trained with another LoRA rank or alpha mean "
            "something else)"
        )
    has_ema = state.ema_steps is not None
    if has_ema != (mine.ema_steps is not None):
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was made {'with' if has_ema else 'without'} a moving average of the "
            f"student; set ema_decay {'above 0' if has_ema else 'to 0'} to resume from it"
        )


def restore_random(directory: str | Path | None, device: torch.device) -> None:
    """Put a checkpoint's random state, the same for any number of processes, back into PyTorch's global generator."""
    if directory is None:
        return
    with safe_open(Path(directory) / WEIGHTS, framework="pt") as file:
        set_global_state(device, file.get_tensor(RANDOM))


def load_weights(directory: str | Path, family: ModelFamily) -> dict[int, Tensor]:
    """Load every role's weights from a checked checkpoint; returns the moving average's tensors by position."""
    tensors = load_file(Path(directory) / WEIGHTS)
    for role in family.roles.trainable_roles:
        prefix = f"{role}."
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        family.roles.load_role_state_dict(role, mine)
    return {int(name.removeprefix(f"{AVERAGE}.")): t for name, t in tensors.items() if name.startswith(f"{AVERAGE}.")}
