"""When a rollout is used again: the effective sample size that allows it, and the check of the first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from watched_rewards import BOLD, Judge, WatchedMatching

from rdm_sdk import RDMError, RDMTrainer

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]


def test_the_effective_sample_size_is_logged(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, state_ratios: list[Tensor]
) -> None:
    """(sum r)^2 / (N sum r^2) of the ratios of all micro-batches together, in uses after the first."""
    trainer = make_trainer(
        tmp_path,
        num_iterations=2,
        max_steps=4,
        gradient_accumulation_steps=2,
        min_effective_sample_size=0.0,
        **BOLD,
    )
    trainer.train()
    rows = losses_of(trainer)
    assert ["ratio/ess" in row for row in rows] == [False, True, False, True]
    for row, pair in ((rows[1], state_ratios[:2]), (rows[3], state_ratios[2:])):
        ratio = torch.cat(pair).double().exp()
        assert len(ratio) == 16
        assert row["ratio/ess"] == pytest.approx(float(ratio.sum() ** 2 / (16 * ratio.square().sum())), rel=1e-6)
        assert row["ratio/mean"] == pytest.approx(float(ratio.mean()), rel=1e-6)
        assert 0 < row["ratio/ess"] < 1


@pytest.mark.parametrize(
    "settings",
    [{"min_effective_sample_size": 1.0, **BOLD}, {"learning_rate": 0.1, "critic_steps": 1, "max_grad_norm": 0.0}],
    ids=["bound", "rate"],
)
def test_a_stale_rollout_is_made_anew(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, settings: dict[str, Any]
) -> None:
    """Below the bound the rollout is dropped, and the same prompts are rolled out and judged afresh."""
    judge, reward = Judge(), WatchedMatching()
    trainer = make_trainer(tmp_path, [reward, (judge, 0.1)], num_iterations=2, max_steps=4, **settings)
    trainer.train()
    rows = losses_of(trainer)
    assert rows[1]["ratio/stopped"] == 1.0
    assert rows[1]["ratio/ess"] < trainer.args.min_effective_sample_size
    assert "ratio/stopped" not in rows[0]
    assert rows[1]["cost/rollouts"] == 2 * 8
    assert judge.asked[0] == judge.asked[1]
    assert torch.equal(reward.judged[1], torch.ones(8))
    assert trainer.state.global_step == 4


def test_an_infinite_ratio_makes_a_rollout_anew(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of samples is NaN then, which is above no bound."""
    infinite = torch.full((8,), 100.0)  # its exponential is, in float32
    monkeypatch.setattr("rdm_sdk.training.rollouts.state_log_ratio", lambda *_: infinite)
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=2)
    trainer.train()
    assert losses_of(trainer)[1]["ratio/stopped"] == 1.0
    assert losses_of(trainer)[1]["cost/rollouts"] == 2 * 8


# ---- The check of the first use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", ["dm", Judge()], ids=["gradient", "scored"])
def test_a_replay_that_does_not_repeat_its_rollout_is_found(make_trainer: Make, tmp_path: Path, rewards: Any) -> None:
    """A student whose forward is random stops the run at its first step, with a message that says why."""
    trainer = make_trainer(tmp_path, rewards, critic_steps=1 if rewards == "dm" else 0)
    plain = trainer.models.denoiser

    def random(role: str, condition: Any, steps: Any = None) -> Any:
        made = plain(role, condition, steps)
        return (lambda x, s: made(x, s) + 0.2 * torch.randn_like(x)) if role == "student" else made

    trainer.models.denoiser = random  # type: ignore[method-assign]
    with pytest.raises(RDMError, match=r"replay of a rollout does not repeat it: the first log-ratio.*random"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_check_lets_small_differences_pass(
    make_trainer: Make, tmp_path: Path, policy_calls: list[tuple[Tensor, Tensor]]
) -> None:
    """Rounding of another batch size is no fault, and the first ratio is still exactly 1."""
    trainer = make_trainer(tmp_path, ["dm", Judge()], max_steps=1)
    plain = trainer.models.denoiser

    def rounding(role: str, condition: Any, steps: Any = None) -> Any:
        made = plain(role, condition, steps)
        return (lambda x, s: made(x, s) + 1e-6 * torch.randn_like(x)) if role == "student" else made

    trainer.models.denoiser = rounding  # type: ignore[method-assign]
    trainer.train()
    ((log_ratios, _),) = policy_calls
    assert torch.equal(log_ratios, torch.zeros(6))
    assert trainer.state.log_history[0]["ratio/clip_fraction"] == 0.0
