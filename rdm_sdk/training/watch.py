"""The watch: looks at what a run logs, and says in a sentence when it goes wrong; or stops it then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from rdm_sdk.training.watch_rules import findings

if TYPE_CHECKING:
    from rdm_sdk.training.trainer import RDMTrainer

logger = logging.getLogger(__name__)

FINDING = "watch"
"""The key of a sentence in the log."""


class Watch(TrainerCallback):
    """Applies `watch_rules` to every log of a run, as the setting `watch` says.

    What it knows is the log alone, and what it finds becomes a row of it: a sentence under `watch`, with `watch_kind`
    and `watch_figure`. So it is in `trainer_state.json` and in every checkpoint, and a resumed run finds what the
    uninterrupted one does. A kind of finding is told once.
    """

    def __init__(self, trainer: RDMTrainer) -> None:
        judging = [reward for reward in trainer.rewards if not reward.capabilities.needs_models]
        self.trainer = trainer
        self.trained = [reward.label for reward in judging if reward.weight > 0]
        self.minimized = [reward.label for reward in judging if reward.weight < 0]
        self.held_out = [reward.label for reward in judging if not reward.weight]

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if args.watch == "off" or not logs or "train_runtime" in logs:
            return
        history: list[dict[str, Any]] = state.log_history  # transformers believes that all of it is numbers
        told = {row["watch_kind"] for row in history if FINDING in row}
        found = []
        for finding in findings(history, self.trained, self.held_out, self.minimized):
            if finding.kind not in told:
                told.add(finding.kind)
                found.append(finding)
        for finding in found:
            row = {FINDING: finding.text, "watch_kind": finding.kind, "watch_figure": finding.figure}
            history.append({**row, "epoch": state.epoch, "step": state.global_step})
            if state.is_world_process_zero:
                logger.warning(f"step {state.global_step}: {finding.text}")
        # By what the first process has found: each logs its share of the samples, and all must stop together.
        if args.watch == "stop" and self.trainer.step.processes.gather(bool(found))[0]:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    f"watch='stop': this run ends at step {state.global_step}. To go on in spite of it, resume with "
                    "watch='warn'"
                )
