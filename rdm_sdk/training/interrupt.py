"""SIGTERM and Ctrl-C: the run saves between two optimizer steps and ends with a line that says how to go on."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from rdm_sdk.training.checkpoint_folders import MANIFEST
from rdm_sdk.training.processes import Processes

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnSignal(TrainerCallback):
    """Ends training after the current optimizer step when a signal has come, with a checkpoint if the run saves any.

    All processes stop after the same step. A second Ctrl-C ends the run at once. Signals are caught in the main thread
    alone, which is the only one that gets them.
    """

    def __init__(self, processes: Processes) -> None:
        self.caught: int | None = None
        """The signal that has come."""
        self.ending = False
        """Whether the optimizer step that is over was the last for it, on all processes."""
        self.processes = processes
        self._before: dict[int, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch the signals during the block."""
        self.caught, self.ending = None, False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        try:
            yield
        finally:
            self.restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        logger.warning(f"{signal.Signals(number).name}: this run ends after the current optimizer step")
        self.caught = number
        self.restore()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        number = self.caught or 0
        if self.processes.count > 1:
            together = self.processes.reduce(torch.tensor(float(number), device=args.device), "sum")
            number = number or (int(signal.SIGTERM) if together > 0 else 0)
        if number:
            self.caught, self.ending = number, True
            control.should_training_stop = True
            control.should_save |= args.save_strategy != SaveStrategy.NO  # "best" asks `_determine_best_metric`

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def leave(self, args: Any, state: TrainerState) -> None:
        """End the program as the signal asks, if one has come: with `KeyboardInterrupt`, or `SystemExit` 143.

        One that came in the last step asks for no more than has happened: the run is over, and its student whole.
        """
        if self.caught is None or state.global_step >= state.max_steps:
            return
        name = f"checkpoint-{state.global_step}"
        saved = (Path(str(args.output_dir)) / name / MANIFEST).is_file() and not args.save_only_model
        message = f"stopped by {signal.Signals(self.caught).name} after optimizer step {state.global_step}" + (
            f"; {name} is in {str(args.output_dir)!r}: go on with "
            "train(resume_from_checkpoint=True), or add --resume_from_checkpoint latest to the same command"
            if saved
            else ", of which there is no checkpoint to go on from; save_strategy and save_only_model say when there is"
        )
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt(message)
        logger.warning(message)
        raise SystemExit(128 + self.caught)
