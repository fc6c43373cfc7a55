"""When numbers go bad, training stops before a weight is spoiled, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import Capabilities, RDMError, Reward, RewardBatch

Make = Callable[..., Any]


class Spoil(TrainerCallback):
    """From the second step on, makes a role's first gradient NaN, as a faulty kernel would; keeps all weights."""

    def __init__(self, role: str, value: float) -> None:
        self.role, self.value = role, value
        self.trainer: Any = None
        self.kept: list[Tensor] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        parameters = self.trainer.parameters_of(self.role)
        parameters[0].register_hook(lambda gradient: torch.full_like(gradient, self.value))
        self.kept = [p.detach().clone() for role in ("student", "fake") for p in self.trainer.parameters_of(role)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("role", "told", "accumulation"),
    [("student", "learning_rate", 1), ("student", "learning_rate", 2), ("fake", "critic_learning_rate", 1)],
)
def test_a_gradient_that_is_not_finite_stops_the_run(
    make_trainer: Make, tmp_path: Path, role: str, told: str, accumulation: int, value: float
) -> None:
    """No role's weights are touched by the step that has it, and the message names the remedies."""
    spoil = Spoil(role, value)
    steps = {"max_steps": 3, "critic_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, callbacks=[spoil], learning_rate=1e-3, **steps)
    spoil.trainer = trainer
    who = "critic" if role == "fake" else role
    with pytest.raises(RDMError, match=f"the {who}'s gradient norm is {value}; lower {told}.*enable_cudnn_sdp"):
        trainer.train()
    assert trainer.state.global_step == 1
    now = [p for role in ("student", "fake") for p in trainer.parameters_of(role)]
    assert all(bool(p.isfinite().all()) for p in now)
    moved = [not torch.equal(one, other) for one, other in zip(spoil.kept, now, strict=True)]
    students = len(trainer.parameters_of("student"))
    assert not any(moved[:students])
    assert any(moved[students:]) == (role == "student")  # the critic's turn comes first


class Flat(Reward):
    """Differentiable, and the same for every picture."""

    capabilities = Capabilities(gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return 0.0 * batch.images.mean(dim=(1, 2, 3))


def test_a_student_that_nothing_moves_is_an_error(make_trainer: Make, tmp_path: Path) -> None:
    """A constant reward has no gradient: said after the first step's backward pass."""
    with pytest.raises(RDMError, match="no gradient reaches the student"):
        make_trainer(tmp_path, [Flat()]).train()


@pytest.mark.parametrize("warmup", [0, 2])
def test_critics_that_cannot_learn_yet_are_no_error(make_trainer: Make, tmp_path: Path, warmup: int) -> None:
    """In a warmup's first step their rate is 0, so they are the teacher, and nothing pulls but for the correction."""
    settings = {"critic_correction": "none", "warmup_steps": warmup, "max_steps": 3}
    make_trainer(tmp_path / "ends", "dm", **settings).train()
    settings |= {"critic_learning_rate": 0.0, "critic_lr_scheduler_type": "constant"}
    with pytest.raises(RDMError, match="no gradient reaches the student"):
        make_trainer(tmp_path / "idle", "dm", **settings).train()
