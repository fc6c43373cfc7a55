"""What `RDMTrainer` shows: samples, the moving average, evaluation and the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_runs import Bright, weights_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import (
    ConfigError,
    digits,
)

Make = Callable[..., Any]
Losses = Callable[[Any], list[dict[str, float]]]


def test_sampling_with_a_seed_is_repeatable_and_leaves_no_trace(make_trainer: Make, tmp_path: Path) -> None:
    """The same seed gives the same pictures, the global random state stays, and no cost is counted."""
    trainer = make_trainer(tmp_path)
    costs, random = trainer.costs(), torch.get_rng_state()
    first = trainer.sample(["seven", "two"], seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.costs() == costs
    assert first.shape == (2, 3, 32, 32)
    assert 0 <= first.min() < first.max() <= 1
    torch.randn(5)
    assert torch.equal(trainer.sample(["seven", "two"], seed=3), first)
    assert not torch.equal(trainer.sample(["seven", "two"], seed=4), first)
    one, other = trainer.sample(["seven"]), trainer.sample(["seven"])
    assert not torch.equal(one, other)  # without a seed, the global state moves on


def test_sample_shows_the_moving_average(make_trainer: Make, tmp_path: Path) -> None:
    """With `ema_decay`, samples come from the average, and the raw weights are back afterwards."""
    trainer = make_trainer(tmp_path, ema_decay=0.99, learning_rate=5e-2)
    trainer.train()
    raw = weights_of(trainer)
    averaged = trainer.sample(["seven"], seed=0)
    assert all(torch.equal(raw[name], p) for name, p in weights_of(trainer).items())
    trainer.models.ema = None
    assert (trainer.sample(["seven"], seed=0) - averaged).abs().max() > 1e-3


class RawWeights(TrainerCallback):
    """Copies the student's raw weights after each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.taken: list[list[Tensor]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.taken.append([p.detach().clone() for p in self.trainer.parameters_of("student")])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_moving_average_is_one_of_all_steps(make_trainer: Make, tmp_path: Path, accumulation: int) -> None:
    """Once per optimizer step, average = d average + (1 - d) weights, with diffusers' warm-up of d."""
    raw = RawWeights()
    trainer = make_trainer(
        tmp_path,
        ema_decay=0.15,
        learning_rate=1e-2,
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        callbacks=[raw],
    )
    raw.trainer = trainer
    trainer.train()
    average = raw.taken[0]
    for step, weights in enumerate(raw.taken[1:], start=1):
        decay = min(0.15, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    for got, expected in zip(trainer.ema.shadow_params, average, strict=True):
        torch.testing.assert_close(got, expected)
    assert any((got - p).abs().max() > 1e-4 for got, p in zip(trainer.ema.shadow_params, raw.taken[-1], strict=True))


def test_evaluate_scores_finished_samples(make_trainer: Make, tmp_path: Path) -> None:
    """`evaluate` gives each image reward's mean, the same each time, and costs the training nothing."""
    trainer = make_trainer(tmp_path, "dm + 0*legibility", eval_dataset=digits.prompts() * 3)
    random, costs = torch.get_rng_state(), trainer.costs()
    metrics = trainer.evaluate()
    assert 0.1 < metrics["eval_rewards/legibility/mean"] <= 1
    assert metrics["eval_loss"] == -metrics["eval_rewards/legibility/mean"]
    assert "eval_rewards/dm/mean" not in metrics
    assert trainer.evaluate() == metrics
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.costs() == costs
    other = trainer.evaluate(["a handwritten seven"], metric_key_prefix="test")
    assert other.keys() - {"epoch"} == {"test_rewards/legibility/mean", "test_rewards/legibility/std", "test_loss"}


def test_evaluation_during_training(make_trainer: Make, tmp_path: Path) -> None:
    """`eval_strategy` works as with any Trainer, and does not change the run."""
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(tmp_path, "dm + 0*legibility", eval_dataset=digits.prompts(), **settings)
        trainer.train()
        runs.append(trainer)
    plain, evaluated = runs
    assert sum("eval_loss" in row for row in evaluated.state.log_history) == 2
    assert all(torch.equal(p, weights_of(evaluated)[name]) for name, p in weights_of(plain).items())


def test_evaluate_needs_a_judge_of_images(make_trainer: Make, tmp_path: Path) -> None:
    """Distribution matching alone cannot judge finished pictures; the message says what to add."""
    with pytest.raises(ConfigError, match=r"dm \+ 0\*legibility"):
        make_trainer(tmp_path, "dm", eval_dataset=["seven"]).evaluate()
    with pytest.raises(ConfigError, match="eval_dataset"):
        make_trainer(tmp_path, "legibility").evaluate()


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer: Make, tmp_path: Path) -> None:
    """`load_best_model_at_end` really brings the best checkpoint's weights back (here: the first, brightest one)."""
    trainer = make_trainer(
        tmp_path,
        Bright(),
        reward_weights=[-1.0],
        critic_steps=0,
        learning_rate=1e-2,
        max_steps=3,
        eval_dataset=digits.prompts(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/bright/mean",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "rdm_state.safetensors")
    for name, tensor in trainer.roles.role_state_dict("student").items():
        assert torch.equal(tensor, best[f"student.{name}"]), name


def test_the_noise_that_explores_is_in_no_sample(make_trainer: Make, tmp_path: Path) -> None:
    """A student trained by "cps" is sampled by the deterministic step: its first noise decides its pictures."""
    trainer = make_trainer(tmp_path, sampler="cps", eta=0.7)
    noise = torch.randn(2, *trainer.models.latent_shapes[0])
    one, other = (trainer.sample(["a handwritten seven"] * 2, noise=noise, seed=seed) for seed in (1, 2))
    assert torch.equal(one, other)
