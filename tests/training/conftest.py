"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import rdm_sdk.training.rollouts
import rdm_sdk.training.step
from rdm_sdk import RDMTrainer


@pytest.fixture
def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the training steps that start."""
    ran: list[int] = []
    original = RDMTrainer.training_step

    def counted(self: RDMTrainer, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RDMTrainer, "training_step", counted)
    return ran


@pytest.fixture
def no_training(steps_run: list[int]) -> Iterator[None]:
    """Fail the test if any training step starts."""
    yield
    assert steps_run == []


@pytest.fixture
def policy_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Take down log-ratios and weights of every policy loss."""
    calls: list[tuple[Tensor, Tensor]] = []
    original = rdm_sdk.training.step.policy_loss

    def watching(log_ratios: Tensor, advantage: Tensor, weights: Tensor, *rest: Any) -> Any:
        calls.append((log_ratios.detach().clone(), weights.detach().clone()))
        return original(log_ratios, advantage, weights, *rest)

    monkeypatch.setattr(rdm_sdk.training.step, "policy_loss", watching)
    return calls


@pytest.fixture
def state_ratios(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Take down the log-ratios of the states of every reuse."""
    seen: list[Tensor] = []
    original = rdm_sdk.training.rollouts.state_log_ratio

    def watching(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(rdm_sdk.training.rollouts, "state_log_ratio", watching)
    return seen
