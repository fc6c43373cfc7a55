"""A step that fails, or is interrupted, leaves nothing behind that a resumed run in the same process would see."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rdm_sdk import RDMTrainer, digits

Make = Callable[..., RDMTrainer]
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "weighting": "balance",
    "learning_rate": 1e-3,
    "critic_steps": 2,
}


@pytest.mark.parametrize("where", ["student_loss", "critic_losses"])
def test_resuming_in_the_same_trainer_is_exact(make_trainer: Make, tmp_path: Path, losses_of: Any, where: str) -> None:
    """Random state, figures and gradients of the step that did not end are gone."""
    whole = make_trainer(tmp_path / "whole", "dm + 0.5*legibility", **SETTINGS)
    whole.train()
    trainer = make_trainer(tmp_path / "broken", "dm + 0.5*legibility", **SETTINGS)
    untouched = getattr(trainer.step, where)

    def broken(turn: int) -> Any:
        if trainer.state.global_step == 2 and turn == (1 if where == "critic_losses" else 0):
            raise KeyboardInterrupt
        return untouched(turn)

    setattr(trainer.step, where, broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    setattr(trainer.step, where, untouched)
    trainer.train(resume_from_checkpoint=True)
    for role in ("student", "fake"):
        for one, other in zip(whole.parameters_of(role), trainer.parameters_of(role), strict=True):
            assert torch.equal(one, other)
    assert losses_of(trainer) == losses_of(whole)


def test_a_signal_saves_where_only_the_best_is_saved(make_trainer: Make, tmp_path: Path) -> None:
    """Whatever the evaluation of the same step says: there is a checkpoint to go on from."""

    class Terminate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = make_trainer(
        tmp_path,
        "dm + 0.1*legibility",
        eval_dataset=digits.prompts()[:2],
        max_steps=3,
        greater_is_better=False,
        callbacks=[Terminate()],
        **settings,
    )

    class KeepBest(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.best_metric = -float("inf")  # nothing is better

    trainer.add_callback(KeepBest())
    with pytest.raises(SystemExit):
        trainer.train()
    assert [folder.name for folder in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2"]
