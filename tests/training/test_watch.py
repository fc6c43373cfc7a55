"""The watch in a run: what it does about a finding, once, and what of it is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from rdm_sdk import ConfigError, RDMConfig
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.watch import Watch
from rdm_sdk.training.watch_rules import Finding

COLLAPSED = [{"step": i, "student/diversity": 1.0 if i < 10 else 0.1} for i in range(20)]


def watching(setting: str, history: list[dict[str, Any]], processes: Processes | None = None) -> TrainerControl:
    """Let the watch see a log; return what it asks the Trainer to do."""
    step = SimpleNamespace(processes=processes or Processes())
    trainer: Any = SimpleNamespace(rewards=[], step=step)
    state, control = TrainerState(global_step=19, epoch=1.0), TrainerControl()
    state.log_history = history
    Watch(trainer).on_log(SimpleNamespace(watch=setting), state, control, history[-1])
    return control


def test_a_finding_is_told_once_and_kept_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """As a warning and as a row, which a resumed run reads again."""
    history = list(COLLAPSED)
    with caplog.at_level(logging.WARNING):
        assert not watching("warn", history).should_training_stop
    assert "step 19: the samples of a prompt are alike" in caplog.text
    row = json.loads(json.dumps(history[-1]))
    assert (row["watch_kind"], row["watch_figure"], row["step"]) == ("collapse", "student/diversity", 19)
    watching("warn", history)
    assert len(history) == len(COLLAPSED) + 1


def test_stopping_is_asked_for() -> None:
    """By a finding that is new; the run that is resumed in spite of it goes on. "off" looks at nothing."""
    history = list(COLLAPSED)
    assert watching("stop", history).should_training_stop
    assert not watching("stop", history).should_training_stop
    untouched = list(COLLAPSED)
    assert not watching("off", untouched).should_training_stop
    assert untouched == COLLAPSED
    healthy = [{"step": i, "student/diversity": 1.0} for i in range(20)]
    assert not watching("stop", healthy).should_training_stop


@pytest.mark.parametrize("first", [True, False])
def test_processes_stop_together(first: bool) -> None:
    """As the first of them has found, whatever the others log of their share."""
    processes = Processes(count=2, gather=lambda mine: [first, mine])
    assert watching("stop", list(COLLAPSED), processes).should_training_stop is first


def test_stopping_needs_logs(tmp_path: Path) -> None:
    """What looks at logs is not accepted where there are none."""
    with pytest.raises(
        ConfigError, match="watch='stop' looks at what is logged, and logging_strategy='no' logs nothing"
    ):
        RDMConfig(output_dir=str(tmp_path), watch="stop", logging_strategy="no")
    with pytest.raises(ConfigError, match="watch='halt' cannot be used"):
        RDMConfig(output_dir=str(tmp_path), watch="halt")


def test_a_run_that_is_stopped_ends_there(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step whose log shows it; the trainer's log holds the sentence."""

    def second_log(history: list[dict[str, Any]], *_: object) -> list[Finding]:
        return [Finding("collapse", "student/diversity", "All alike.")] if len(history) > 1 else []

    monkeypatch.setattr("rdm_sdk.training.watch.findings", second_log)
    trainer = make_trainer(tmp_path, max_steps=6, watch="stop", critic_steps=1)
    trainer.train()
    assert trainer.state.global_step == 2
    saved = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    assert [row["watch_kind"] for row in saved["log_history"] if "watch" in row] == ["collapse"]
