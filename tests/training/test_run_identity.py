"""What a resumed run may change, and what would make it another run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from rdm_sdk import CheckpointError, RDMConfig, RDMTrainer, digits
from rdm_sdk.training.identity import FIXED_BY_TRANSFORMERS, PLACES, RATES
from rdm_sdk.training.weighting import Fixed

Make = Callable[..., RDMTrainer]
SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def run(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run with checkpoint 1 of 4 steps."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=1, **SAVING).train()
    return folder


def test_every_setting_is_of_one_kind() -> None:
    """Names that are listed exist, and no setting is listed twice."""
    names = {field.name for field in fields(RDMConfig)}
    inherited = {field.name for field in fields(TrainingArguments)}
    assert names >= RATES | PLACES | FIXED_BY_TRANSFORMERS
    assert not RATES & PLACES
    assert not PLACES & inherited
    assert inherited >= FIXED_BY_TRANSFORMERS


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"prompts": digits.prompts()[::-1]}, "other prompts"),
        ({"num_generations": 8}, "num_generations: 4 -> 8"),
        ({"per_device_train_batch_size": 16}, "per_device_train_batch_size * processes: 8 -> 16"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 -> 2"),
        ({"guidance_scale": 2.0}, "guidance_scale: 1.0 -> 2.0"),
        ({"sampler": "ode"}, "sampler: 'renoise' -> 'ode'"),
        ({"num_inference_steps": 2, "matching": "mixture"}, "num_inference_steps: 4 -> 2"),
        ({"weighting": "balance"}, "weighting: 'fixed' -> 'balance'"),
        ({"shift": 2.0}, "shift: None -> 2.0"),
        ({"min_time": 0.1}, "min_time: 0.02 -> 0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("no_training")
def test_another_run_is_refused(make_trainer: Make, run: Path, changed: dict[str, Any], words: str) -> None:
    """The message says what was, what is, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        make_trainer(run, **(SAVING | {"max_steps": 4} | changed)).train(resume_from_checkpoint=True)
    assert words in str(caught.value) or "do not fit" in str(caught.value)
    assert "esume with the same" in str(caught.value)


def wanted(
    images: Tensor, prompts: list[str], words: list[list[str]], weight: list[float] | None = None
) -> list[float]:
    """A score that reads two columns."""
    return [float(len(each)) for each in words]


@pytest.mark.parametrize(
    ("changed", "is_another"),
    [({"words": [["a"], ["x"]]}, True), ({"weight": [1, 3]}, True), ({"note": ["c", "d"]}, False)],
    ids=["needed", "read", "of no reward"],
)
def test_other_entries_that_rewards_read_are_another_run(
    changed: dict[str, Any], is_another: bool, make_trainer: Make, tmp_path: Path
) -> None:
    """As other prompts are; what nobody reads may change."""
    data = {"prompt": ["a", "b"], "words": [["a"], ["b"]], "weight": [1, 2], "note": ["a", "b"]}
    rewards = ["dm", (wanted, 0.1)]
    make_trainer(tmp_path, rewards, Dataset.from_dict(data), max_steps=1, **SAVING).train()
    again = make_trainer(tmp_path, rewards, Dataset.from_dict(data | changed), max_steps=1, **SAVING)
    if is_another:
        with pytest.raises(CheckpointError, match="other prompts or entries of columns that rewards read"):
            again.train(resume_from_checkpoint=True)
    else:
        assert again.train(resume_from_checkpoint=True).global_step == 1


def test_other_rates_count_and_are_told(make_trainer: Make, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The learning rates of the new settings are those of the next step, scaled by where the schedule stands."""
    settings = {"learning_rate": 3e-4, "critic_learning_rate": 5e-4, "adam_beta2": 0.9, "weight_decay": 0.01}
    trainer = make_trainer(run, max_steps=4, **settings)  # it saves nothing, so that the folder stays as it is
    rates: list[float] = []
    step = trainer.training_step

    def watched(*args: Any) -> Any:
        assert trainer.critic_optimizer is not None
        rates.extend([trainer.optimizer.param_groups[0]["lr"], trainer.critic_optimizer.learning_rate])
        return step(*args)

    trainer.training_step = watched
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert rates == pytest.approx([rate * left**2 for left in (0.75, 0.5, 0.25) for rate in (3e-4, 5e-4)])
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.0, 0.9), 0.01)
    for change in ("learning_rate: 0.0002 -> 0.0003", "critic_learning_rate: None -> 0.0005", "max_steps: 1 -> 4"):
        assert f"resuming with another {change}" in caplog.text


def test_other_options_of_the_optimizer_count_and_are_told(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, max_steps=1, optim="sgd", optim_args="momentum=0.9", **SAVING).train()
    trainer = make_trainer(tmp_path, max_steps=2, optim="sgd", optim_args="momentum=0.5", **SAVING)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5
    assert "resuming with another optim_args: 'momentum=0.9' -> 'momentum=0.5'" in caplog.text


def test_a_longer_run_has_its_own_schedule_at_once(make_trainer: Make, run: Path) -> None:
    """With `max_steps` alone changed, the next step's rate is the longer schedule's, not what the shorter ended at."""
    trainer = make_trainer(run, max_steps=4)
    rates: list[float] = []
    step = trainer.training_step

    def watched(*args: Any) -> Any:
        assert trainer.critic_optimizer is not None
        rates.extend([trainer.optimizer.param_groups[0]["lr"], trainer.critic_optimizer.learning_rate])
        return step(*args)

    trainer.training_step = watched
    trainer.train(resume_from_checkpoint=True)
    assert rates[:2] == pytest.approx([0.75**2 * 2e-4, 0.75**2 * 4e-4])


@pytest.mark.parametrize("weighting", ["fixed", "balance"])
def test_other_weights_of_rewards_count_at_once(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, weighting: str
) -> None:
    """As rates do: in the spec or as `reward_weights`, from the first step on, and a line says so."""
    settings = {"weighting": weighting, **SAVING}
    make_trainer(tmp_path, "dm + 0.5*legibility", max_steps=2, **settings).train()
    changed: dict[str, Any]
    for step, changed in (
        (3, {"rewards": "dm + 2*legibility"}),
        (4, {"rewards": "dm + 2*legibility", "reward_weights": [1, 2]}),
    ):
        caplog.clear()
        trainer = make_trainer(tmp_path, max_steps=step, **settings, **changed)
        trainer.train(resume_from_checkpoint=True)
        before, now = ("0.5", "2") if step == 3 else ("2", "4")
        assert f"resuming with another weight of 'legibility': {before} -> {now}" in caplog.text
        rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
        ratio = rows[step]["weights/legibility"] / rows[step - 1]["weights/legibility"]
        assert ratio == pytest.approx(float(now) / float(before), rel=0.2 if weighting == "balance" else 1e-6)


def test_the_rate_of_a_schedule_by_a_metric_cannot_change(make_trainer: Make, tmp_path: Path) -> None:
    """It keeps the rate to itself: said, in the place of a line that another rate counts and one that does not."""
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "critic_lr_scheduler_type": "constant", "max_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "loss", "eval_dataset": ["a zero"], "critic_steps": 1}
    make_trainer(tmp_path, "dm + 0*legibility", **settings).train()
    folder = str(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="the learning rate cannot change"):
        make_trainer(tmp_path, "dm + 0*legibility", learning_rate=5e-3, **settings).train(folder)
    make_trainer(tmp_path, "dm + 0*legibility", **settings).train(folder)


def test_another_weighting_makes_another_run(make_trainer: Make, tmp_path: Path) -> None:
    """Also one of the user's own, which no setting names."""

    class Mine(Fixed):
        pass

    saving = {"save_strategy": "steps", "save_steps": 1, "critic_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, weighting=Mine(), **saving).train()
    with pytest.raises(CheckpointError, match="was made with the weighting Mine; this run has Fixed"):
        make_trainer(tmp_path, **saving).train(str(tmp_path / "checkpoint-1"))
