"""What a run leaves beside its checkpoints: its settings and versions, and all that it logged."""

from __future__ import annotations

import json
import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rdm_sdk._version import __version__
from rdm_sdk.files import replacing
from rdm_sdk.training.identity import run_settings
from rdm_sdk.training.run_file import write_run_file
from rdm_sdk.training.run_log import LOG

if TYPE_CHECKING:
    from rdm_sdk.training.config import RDMConfig
    from rdm_sdk.training.trainer import RDMTrainer

logger = logging.getLogger(__name__)

RECORD = "run.json"
"""What `rdm-sdk report` reads of a run, beside its log."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchmetrics")


def versions() -> dict[str, str]:
    """Return the versions of the SDK, of Python and of the packages that figures depend on."""
    found = {"rdm-sdk": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build without metadata
            found[name] = "unknown"
    return found


class RunRecord(TrainerCallback):
    """Writes a run's settings when training begins, every log into the run's file, and `trainer_state.json` at the end.

    The logs of a run that goes on begin with its past.
    """

    def __init__(self, trainer: RDMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        keeper = self.trainer.keeper
        if args.should_save:
            self._write(keeper.records / RECORD, args)
            write_run_file(self.trainer, keeper.records)
        keeper.begin_log(state)

    def _write(self, path: Path, args: RDMConfig) -> None:
        content = {
            "base": self.trainer.family.base_name,
            "rewards": [
                {"reward": reward.term.reference, "weight": reward.weight, "route": reward.route}
                for reward in self.trainer.rewards
            ],
            "settings": run_settings(args),
            "versions": versions(),
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with replacing(path) as staged:
            staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self.trainer.keeper.log.append(state.log_history)
        except OSError as error:  # nothing is lost: it is in memory, and a checkpoint is not written without it
            logger.warning(f"{LOG} could not be written ({error}); the next log tries again")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.should_save:
            try:
                with replacing(self.trainer.keeper.records / TRAINER_STATE_NAME) as staged:
                    state.save_to_json(str(staged))
            except OSError as error:  # the student that was trained is still to be saved, maybe on another disk
                logger.warning(f"{TRAINER_STATE_NAME} could not be written ({error}); {LOG} has the same figures")
