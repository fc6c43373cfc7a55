"""What a run logs is whole in one file, and checkpoints stay small; resumed runs and reports find all of it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState

from rdm_sdk import DataError, RDMTrainer
from rdm_sdk.evaluation.report.reading import read_run
from rdm_sdk.training import run_log
from rdm_sdk.training.run_log import KEPT, LogFile, parsed, read_log, whole_history

Make = Callable[..., RDMTrainer]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "critic_steps": 1}


def row(step: int) -> dict[str, Any]:
    """Return about what a run with two rewards logs."""
    names = [f"{name}/{part}" for name in ("dm", "rewards/legibility", "weights") for part in "abcdefghij"]
    return {"step": step, "loss": step / 7, "broken": float("nan")} | dict.fromkeys(names, step / 3)


class LogsMuch(TrainerCallback):
    """Logs as 400 steps do at the end of each."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        state.log_history += [row(400 * (state.global_step - 1) + i) for i in range(400)]


def figures(history: list[dict[str, Any]]) -> str:
    """Return a history without what is of the clock; text, in which NaN is NaN."""
    kept = [{k: v for k, v in row.items() if "train_" not in k and "seconds" not in k} for row in history]
    return json.dumps(kept, sort_keys=True)


def test_checkpoints_do_not_grow_with_the_log(make_trainer: Make, tmp_path: Path) -> None:
    """The state after 800 steps has the bytes of that after 400; memory, file and the state of the end have all."""
    trainer = make_trainer(tmp_path, callbacks=[LogsMuch()], **SAVING)
    trainer.train()
    sizes = [(tmp_path / f"checkpoint-{n}" / "trainer_state.json").stat().st_size for n in (1, 2)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert sizes[1] < 2 * KEPT * 1000
    history = trainer.state.log_history
    assert len(history) == 803  # with a log of each step, and of the time it took
    end = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    assert figures(end["log_history"]) == figures(history) == figures(read_run(tmp_path).history)


def test_a_resumed_run_knows_all_that_was_logged(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its watch sees what the uninterrupted one's saw, and the file ends alike; from another folder as well."""
    monkeypatch.setattr(run_log, "KEPT", 2)
    seen: list[str] = []
    monkeypatch.setattr("rdm_sdk.training.watch.findings", lambda history, *_: seen.append(figures(history)) or [])
    trainer = make_trainer(tmp_path / "run", max_steps=6, **SAVING)
    trainer.train()
    whole, seen[:] = list(seen), []
    assert len(whole) == 6
    before = figures(parsed(read_log(tmp_path / "run" / "log.jsonl")))
    for place in ("run", "elsewhere"):
        resumed = make_trainer(tmp_path / place, max_steps=6, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert seen == whole[4:]
        assert figures(resumed.state.log_history) == figures(trainer.state.log_history)
        assert figures(parsed(read_log(tmp_path / place / "log.jsonl"))) == before
        seen.clear()
    ended = (tmp_path / "run" / "log.jsonl").read_bytes()
    again = make_trainer(tmp_path / "run", max_steps=6, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert len(again.state.log_history) == 6
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == ended


def test_a_lost_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the checkpoint keeps is then all; one that keeps fewer logs had no more."""
    history = [row(step) for step in range(3 * KEPT)]
    log = LogFile(tmp_path / "log.jsonl")
    log.begin(history)
    assert figures(whole_history(history[KEPT : 2 * KEPT], log.path)) == figures(history[: 2 * KEPT])
    assert whole_history(history[:3], tmp_path / "none") == history[:3]
    assert caplog.text == ""
    for path in (tmp_path / "none", log.path):
        kept = [row(step) for step in range(7000, 7000 + KEPT)]
        assert whole_history(kept, path) is kept
        assert f"does not hold what was logged up to step {6999 + KEPT}" in caplog.text
        caplog.clear()


def test_reports_of_runs_that_were_killed(make_trainer: Make, tmp_path: Path) -> None:
    """Up to the last whole line, though the newest checkpoint is older; of a checkpoint alone, what it keeps."""
    run = tmp_path / "run"
    make_trainer(run, callbacks=[LogsMuch()], **SAVING).train()
    shutil.rmtree(run / "checkpoint-2")
    (run / "trainer_state.json").unlink()
    lines = read_log(run / "log.jsonl")
    (run / "log.jsonl").write_text("\n".join(lines[:600]) + '\n{"step": 9', encoding="utf-8")
    found = read_run(run)
    assert (len(found.history), found.step, found.max_steps) == (600, found.history[-1]["step"], 2)
    assert len(read_run(run / "checkpoint-1").history) == 401
    shutil.copytree(run / "checkpoint-1", tmp_path / "alone")
    assert len(read_run(tmp_path / "alone").history) == KEPT
    shutil.rmtree(run / "checkpoint-1")
    assert (len(read_run(run).history), read_run(run).max_steps) == (600, 2)
    (run / "log.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(run)


def test_a_full_disk_loses_no_log(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next log writes what did not fit, over the part of it that did."""
    real, failing = LogFile.append, [1, 2]

    def append(self: LogFile, history: list[dict[str, Any]], wait: bool = False) -> None:
        if len(history) in failing:
            with self.path.open("a") as file:
                file.write('{"a part": ')
            raise OSError(28, "No space left on device")
        real(self, history, wait)

    monkeypatch.setattr(LogFile, "append", append)
    trainer = make_trainer(tmp_path, max_steps=3, critic_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "log.jsonl could not be written ([Errno 28] No space left on device)" in caplog.text
    assert figures(trainer.state.log_history) == figures(read_run(tmp_path).history)


def test_a_file_that_is_removed_is_written_again(tmp_path: Path) -> None:
    """By the next log; nothing is written before the training begins."""
    history = [row(step) for step in range(5)]
    log = LogFile(tmp_path / "folder" / "log.jsonl")
    log.append(history)
    assert not log.path.exists()
    log.begin(history[:2])
    log.path.unlink()
    log.append(history)
    assert len(read_log(log.path)) == 5


def test_a_full_disk_leaves_the_log_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written takes no file's place; a run without a past begins without a file."""
    log, history = LogFile(tmp_path / "log.jsonl"), [row(step) for step in range(5)]
    log.begin(history)
    before = log.path.read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        LogFile(log.path).begin(history[:3])
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    LogFile(log.path).begin([])
    assert not log.path.exists()
