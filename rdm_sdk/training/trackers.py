"""What trackers get beside the scalars that transformers' callbacks send: what the run is, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from rdm_sdk.rewards.spec import show_spec, without_places

if TYPE_CHECKING:
    from rdm_sdk.training.trainer import RDMTrainer

PICTURES = "pictures"
"""What trackers call the grids of `log_images`."""
PROMPTS = 10
"""Prompts that a tracker is told: as many as the pictures show."""


def description(trainer: RDMTrainer) -> dict[str, Any]:
    """Return what a run is, for people who compare runs: base, rewards, LoRA settings by role, and prompts."""
    terms = [without_places(reward.term) for reward in trainer.rewards]
    dataset = trainer.train_dataset
    prompts = [] if dataset is None else dataset[: 64 * PROMPTS]["prompt"]
    return {
        "base": trainer.family.base_name,
        "rewards": show_spec(terms),
        "routes": {reward.label: reward.route for reward in trainer.rewards},
        "lora": {role: trainer.roles.describe(role) for role in trainer.roles.trainable_roles},
        "prompts": list(dict.fromkeys(prompts))[:PROMPTS],
        "number_of_prompts": 0 if dataset is None else len(dataset),
    }


def _describe_to_tensorboard(tracker: Any, content: Mapping[str, Any]) -> None:
    rows = "\n".join(f"| {name} | {value} |" for name, value in content.items())
    tracker.tb_writer.add_text("run", f"| | |\n|---|---|\n{rows}")
    tracker.tb_writer.flush()


def _picture_to_tensorboard(tracker: Any, path: Path, step: int) -> None:
    with Image.open(path) as picture:
        tracker.tb_writer.add_image(PICTURES, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    tracker.tb_writer.flush()


def _describe_to_wandb(tracker: Any, content: Mapping[str, Any]) -> None:
    _client(tracker).config.update({"run": dict(content)}, allow_val_change=True)


def _picture_to_wandb(tracker: Any, path: Path, step: int) -> None:
    # By the step that transformers' callback has chosen for the axis: W&B's counter is that of its calls.
    client = _client(tracker)
    client.log({PICTURES: client.Image(str(path)), "train/global_step": step})


def _client(tracker: Any) -> Any:
    """Return the library of W&B, or Trackio's, which has W&B's interface."""
    return tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio


_Describe = Callable[[Any, Mapping[str, Any]], None]
_Show = Callable[[Any, Path, int], None]
TRACKERS: dict[type[TrainerCallback], tuple[_Describe, _Show]] = {
    TensorBoardCallback: (_describe_to_tensorboard, _picture_to_tensorboard),
    WandbCallback: (_describe_to_wandb, _picture_to_wandb),
    TrackioCallback: (_describe_to_wandb, _picture_to_wandb),
}
"""Transformers' callback to what tells its tracker what the run is, and what shows it a picture."""


def trackers_of(callbacks: Sequence[object]) -> list[tuple[object, _Describe, _Show]]:
    """Return the trackers among a trainer's callbacks, with how they are told and shown things."""
    return [
        (callback, *ways) for callback in callbacks for kind, ways in TRACKERS.items() if isinstance(callback, kind)
    ]


class TellTrackers(TrainerCallback):
    """Tells the trackers what the run is when training begins; transformers' callbacks, which come first, are ready."""

    def __init__(self, trainer: RDMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            content = description(self.trainer)
            for tracker, describe, _show in trackers_of(self.trainer.callback_handler.callbacks):
                describe(tracker, content)

    def show(self, path: Path, step: int) -> None:
        """Show a picture of a step to every tracker."""
        for tracker, _describe, show in trackers_of(self.trainer.callback_handler.callbacks):
            show(tracker, path, step)
