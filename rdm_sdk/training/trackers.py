"""What trackers get beside the scalars that transformers' callbacks send: what the run is, and its pictures."""

from __future__ import annotations

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


class TellTrackers(TrainerCallback):
    """Tells the trackers what the run is when training begins; transformers' callbacks, which come first, are ready."""

    def __init__(self, trainer: RDMTrainer) -> None:
        self.trainer = trainer

    def _writers(self) -> list[Any]:
        """Return TensorBoard's writers, one if it is asked for."""
        callbacks = self.trainer.callback_handler.callbacks
        return [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]

    def _clients(self) -> list[Any]:
        """Return the libraries of W&B and Trackio, which has W&B's interface, as far as they are asked for."""
        callbacks = self.trainer.callback_handler.callbacks
        wandb = [callback._wandb for callback in callbacks if isinstance(callback, WandbCallback)]
        return wandb + [callback._trackio for callback in callbacks if isinstance(callback, TrackioCallback)]

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        content = description(self.trainer)
        for writer in self._writers():
            rows = "\n".join(f"| {name} | {value} |" for name, value in content.items())
            writer.add_text("run", f"| | |\n|---|---|\n{rows}")
            writer.flush()
        for client in self._clients():
            client.config.update({"run": content}, allow_val_change=True)

    def show(self, path: Path, step: int) -> None:
        """Show a picture of a step to every tracker."""
        for writer in self._writers():
            with Image.open(path) as picture:
                writer.add_image(PICTURES, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            writer.flush()
        for client in self._clients():
            # By the step that transformers' callback has chosen for the axis: W&B's counter is that of its calls.
            client.log({PICTURES: client.Image(str(path)), "train/global_step": step})
