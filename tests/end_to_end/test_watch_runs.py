"""The watch on real runs of the embedded teacher: planted faults are stopped and explained, healthy runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digit_runs import Bright
from torch import Tensor

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, write_report

pytestmark = pytest.mark.slow
Make = Callable[..., RDMTrainer]

LEARNING: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "critic_learning_rate": 4e-3,
    "critic_steps": 3,
    "max_steps": 40,
    "watch": "stop",
}
"""Rates at which a run on the digits learns, at a quarter of the demo's batch and steps."""


class Alike(Reward):
    """Minus the squared distance of a sample from the mean of its group: a collapse is what maximizes it."""

    name = "alike"
    capabilities = Capabilities(space="pixel", gradient="autograd", scope="group")

    def score(self, batch: RewardBatch) -> Tensor:
        groups = batch.images.unflatten(0, (-1, batch.group_size))
        return -(groups - groups.mean(1, keepdim=True)).square().flatten(2).mean(2).flatten()


def told(trainer: RDMTrainer) -> list[dict[str, Any]]:
    """Return what the watch has found."""
    return [row for row in trainer.state.log_history if "watch" in row]


def test_a_gamed_reward_is_stopped_and_explained(make_trainer: Make, tmp_path: Path) -> None:
    """Brightness at three times the weight of matching: white squares, which the classifier cannot read."""
    rewards = [("dm", 1.0), (Bright(), 3.0), ("legibility", 0.0)]
    trainer = make_trainer(tmp_path, rewards, **LEARNING)
    trainer.train()
    (row,) = told(trainer)
    assert trainer.state.global_step == row["step"] < 30
    assert row["watch_kind"] == "hack"
    assert "the student games its reward: 'bright' rose from 0.3" in row["watch"]
    saved = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    assert row in saved["log_history"]
    page = write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the student games its reward: &#39;bright&#39; rose from 0.3" in page


def test_a_collapse_is_stopped_and_explained(make_trainer: Make, tmp_path: Path) -> None:
    """A reward for samples that are alike: the variety of a prompt's samples is gone."""
    trainer = make_trainer(tmp_path, [("dm", 0.2), (Alike(), 1.0)], **LEARNING)
    trainer.train()
    (row,) = told(trainer)
    assert trainer.state.global_step == row["step"] < 30
    assert row["watch_figure"] == "student/diversity"
    assert "the samples of a prompt are alike" in row["watch"]


@pytest.mark.parametrize(
    ("seed", "rewards", "settings"),
    [
        (0, "dm", {}),
        (1, "dm + 0.1*legibility + 0*jpeg", {}),
        (2, "dm + 0*legibility", {"critic_rollouts": "fresh", "num_generations": 8}),
        (3, "dm + 0.2*jpeg + 0*legibility", {"reward_route": "tilt", "num_iterations": 2}),
        (4, "dm + 0.3*legibility + 0*jpeg", {"reward_route": "advantage", "matching": "mixture", "logging_steps": 2}),
    ],
)
def test_healthy_runs_go_on(
    seed: int, rewards: str, settings: dict[str, Any], make_trainer: Make, tmp_path: Path
) -> None:
    """Several ways to train, with rewards at weights that do them good."""
    trainer = make_trainer(tmp_path, rewards, seed=seed, **(LEARNING | settings))
    trainer.train()
    assert told(trainer) == []
    assert trainer.state.global_step == 40
