"""The best checkpoint of a run (`load_best_model_at_end`): it is there at the end, and the newest stays beside it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from rdm_sdk import CheckpointError, RDMTrainer
from rdm_sdk.training import checkpoint_folders

Make = Callable[..., RDMTrainer]


class Falling:
    """A score that is lower in each evaluation, so that the first one was the best."""

    __name__ = "falling"

    def __init__(self) -> None:
        self.score = 1.0

    def __call__(self, images: Tensor) -> list[float]:
        self.score -= 0.1
        return [self.score] * len(images)


def make(make_trainer: Make, folder: Path, **settings: Any) -> RDMTrainer:
    """Return a trainer of three steps whose first checkpoint is the best."""
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"metric_for_best_model": "eval_rewards/falling/mean", "greater_is_better": True}
    rewards = ["dm", (Falling(), 0.0)]
    settings = {"max_steps": 3, "logging_steps": 10, "learning_rate": 3e-3, "load_best_model_at_end": True} | settings
    return make_trainer(folder, rewards, eval_dataset=["a zero"], **every_step, **best, **settings)


def student(trainer: RDMTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters_of("student")])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_newest_stays_beside_the_best(make_trainer: Make, tmp_path: Path) -> None:
    """Where one may stay: Trainer would remove the other at the end, and the run could not go on."""
    trainer = make(make_trainer, tmp_path, save_total_limit=1)
    trainer.train()
    assert Path(str(trainer.state.best_model_checkpoint)).name == "checkpoint-1"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_what_a_signal_saved_stays(make_trainer: Make, tmp_path: Path) -> None:
    """It is what the line about it says to go on from."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make(make_trainer, tmp_path, save_total_limit=1, callbacks=[Stop()])
    with pytest.raises(SystemExit):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_finished_run_that_is_started_again_ends_alike(make_trainer: Make, tmp_path: Path) -> None:
    """With the best weights, not those of its last step."""
    first = make(make_trainer, tmp_path)
    first.train()
    last = make(make_trainer, tmp_path, load_best_model_at_end=False)
    last.train(resume_from_checkpoint=True)
    again = make(make_trainer, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(student(again), student(first))
    assert not torch.equal(student(last), student(first))


def test_a_finished_run_that_was_moved_ends_alike(make_trainer: Make, tmp_path: Path) -> None:
    """As to another machine: its state names the place of its best checkpoint when that was written."""
    first = make(make_trainer, tmp_path / "here")
    first.train()
    (tmp_path / "here").rename(tmp_path / "there")
    again = make(make_trainer, tmp_path / "there")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(student(again), student(first))


def test_a_run_that_was_moved_remembers_its_best(make_trainer: Make, tmp_path: Path) -> None:
    """It is kept and loaded in the end, as if nothing had been moved."""
    make(make_trainer, tmp_path / "here", max_steps=2).train()
    (tmp_path / "here").rename(tmp_path / "there")
    again = make(make_trainer, tmp_path / "there", save_total_limit=1)
    judge = again.rewards[1].reward.function
    assert isinstance(judge, Falling)
    judge.score = 0.8  # as after the two evaluations before
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-1")
    assert names(tmp_path / "there") == ["checkpoint-1", "checkpoint-3"]


def test_a_best_checkpoint_that_is_gone_is_told_before_the_run_goes_on(make_trainer: Make, tmp_path: Path) -> None:
    """At its end, the run would have had nothing to load."""
    make(make_trainer, tmp_path, max_steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-1")
    again = make(make_trainer, tmp_path)
    with pytest.raises(CheckpointError, match=r"neither beside it nor at .*load_best_model_at_end=False"):
        again.train(resume_from_checkpoint=True)
    make(make_trainer, tmp_path, load_best_model_at_end=False).train(resume_from_checkpoint=True)


def test_every_process_knows_where_the_best_is(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that save nothing: they load it at the end, from its last place."""
    trainer = make_trainer(tmp_path, max_steps=1)
    keeper, state = trainer.keeper, TrainerState(global_step=1, best_global_step=1)
    monkeypatch.setattr(keeper, "args", SimpleNamespace(should_save=False, output_dir=str(tmp_path)))
    monkeypatch.setattr(checkpoint_folders, "verify", lambda folder: None)
    (tmp_path / ".writing-1" / "checkpoint-1").mkdir(parents=True)  # by the process that saves
    with keeper.writing(state, tmp_path):
        state.best_model_checkpoint = str(tmp_path / ".writing-1" / "checkpoint-1")
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_all_processes_go_by_what_the_first_ones_judge_says(make_trainer: Make, tmp_path: Path) -> None:
    """It need not say the same to each: they would save at different steps, and keep different checkpoints as best.

    An evaluation that the user asks for may be that of one process alone, so nobody is waited for.
    """
    trainer = make(make_trainer, tmp_path, max_steps=1)
    first = {"eval_rewards/falling/mean": 3.0, "eval_loss": -3.0}

    def gather(mine: Any) -> list[Any]:
        return [first, mine] if "eval_loss" in mine else [mine]

    trainer.judge.processes = replace(trainer.judge.processes, gather=gather)
    trainer.train()
    assert trainer.state.best_metric == 3.0
    assert [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row] == [-3.0]
    assert trainer.evaluate()["eval_rewards/falling/mean"] < 1.0
