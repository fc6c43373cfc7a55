"""What a caught signal does at the end of a step, and what the line says that ends the program."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from rdm_sdk import RDMConfig
from rdm_sdk.training.checkpoint_folders import MANIFEST
from rdm_sdk.training.interrupt import SaveOnSignal
from rdm_sdk.training.processes import Processes


def config(folder: Path, **settings: object) -> RDMConfig:
    """Return settings of a run in a folder."""
    return RDMConfig(output_dir=str(folder), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("strategy", "asked", "saves"), [("steps", False, True), ("no", False, False), ("no", True, True)]
)
def test_the_step_ends_the_run(tmp_path: Path, strategy: str, asked: bool, saves: bool) -> None:
    """It saves where the run does, and where another callback has asked for it."""
    interrupt, control = SaveOnSignal(Processes()), TrainerControl(should_save=asked)
    args = config(tmp_path, save_strategy=strategy)
    interrupt.on_step_end(args, TrainerState(), control)
    assert not control.should_training_stop
    interrupt.caught = signal.SIGTERM
    interrupt.on_step_end(args, TrainerState(), control)
    assert (control.should_training_stop, control.should_save) == (True, saves)


def test_every_process_stops_when_one_is_told_to(tmp_path: Path) -> None:
    """The one that got no signal learns of it from the sum over all."""
    interrupt, control = SaveOnSignal(Processes(2, lambda tensor, how: tensor + int(signal.SIGTERM))), TrainerControl()
    interrupt.on_step_end(config(tmp_path), TrainerState(), control)
    assert control.should_training_stop


@pytest.mark.parametrize("saved", [True, False])
def test_the_line_tells_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture, saved: bool) -> None:
    """It names a checkpoint only where there is one: a signal may come when the last step is past."""
    interrupt = SaveOnSignal(Processes())
    interrupt.leave(config(tmp_path), TrainerState(global_step=3, max_steps=9))  # nothing was caught
    if saved:
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / MANIFEST).touch()
    interrupt.caught = signal.SIGINT
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3 is in" if saved else "no checkpoint to go on from"):
        interrupt.leave(config(tmp_path), TrainerState(global_step=3, max_steps=9))
    interrupt.caught = signal.SIGTERM
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as left:
        interrupt.leave(config(tmp_path), TrainerState(global_step=3, max_steps=9))
    assert left.value.code == 143
    assert ("checkpoint-3 is in" in caplog.text) == saved


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    """The run ends after that step in any case, and whoever trains saves the student."""
    interrupt = SaveOnSignal(Processes())
    for number in (signal.SIGINT, signal.SIGTERM):
        interrupt.caught = number
        interrupt.leave(config(tmp_path), TrainerState(global_step=9, max_steps=9))
