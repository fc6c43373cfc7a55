"""Rewards that judge a run's evaluations and nothing else (`eval_rewards`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rdm_sdk import ConfigError, DataError, RDMConfig, RDMTrainer, RewardError, plan_memory
from rdm_sdk.rewards.resolve import plan_rewards, split_held_out
from rdm_sdk.training.watch import Watch

Make = Callable[..., RDMTrainer]
PROMPTS = ["a zero", "a one"]

asked: list[int] = []


def held(images: Any, prompts: Any) -> Any:
    """A held-out reward, named by its place; takes down what it is shown."""
    asked.append(len(images))
    return images.mean(dim=(1, 2, 3)).tolist()


def wants(images: Any, wanted: Any) -> Any:
    return [1.0] * len(images)


def test_they_judge_evaluations_and_leave_training_alone(make_trainer: Make, tmp_path: Path, losses_of: Any) -> None:
    """Their mean is logged and chooses the best; the run is, to the bit, the one without them."""
    asked.clear()
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": PROMPTS}
    plain = make_trainer(tmp_path / "plain", "dm + 0.1*legibility", **settings)
    plain.train()
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    best |= {"metric_for_best_model": "eval_rewards/held/mean", "greater_is_better": True}
    trainer = make_trainer(
        tmp_path / "held", "dm + 0.1*legibility", eval_rewards="test_eval_rewards:held", **settings, **best
    )
    assert [reward.label for reward in trainer.rewards] == ["dm", "legibility"]
    trainer.train()
    assert asked == [2, 2]  # once per evaluation, whatever trains
    assert losses_of(trainer) == losses_of(plain)
    assert not any("rewards/held" in name for row in trainer.state.log_history if "loss" in row for name in row)
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["eval_loss"] == -row["eval_rewards/legibility/mean"]  # as without them
    assert trainer.state.best_metric == max(row["eval_rewards/held/mean"] for row in rows)


def test_dm_alone_is_evaluated_by_them(make_trainer: Make, tmp_path: Path) -> None:
    """A run without another reward that judges images has its figures from them."""
    trainer = make_trainer(tmp_path, "dm", eval_rewards="legibility", eval_dataset=PROMPTS)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == -metrics["eval_rewards/legibility/mean"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"eval_rewards": "held_out"}, RewardError, "unknown reward 'held_out'"),
        ({"eval_rewards": ""}, RewardError, "the reward spec is empty"),
        ({"eval_rewards": "guidance"}, ConfigError, "'guidance' needs the models of a run"),
        (
            {"eval_rewards": "legibility"},
            RewardError,
            "evaluate() judges by those as well, so leave it out",
        ),
        ({"eval_rewards": "test_eval_rewards:held", "eval_dataset": None}, ConfigError, "pass eval_dataset"),
        ({"eval_rewards": "test_eval_rewards:wants"}, DataError, "needs a column 'wanted', and eval_dataset has none"),
        (
            {
                "eval_rewards": "test_eval_rewards:wants",
                "eval_dataset": Dataset.from_dict({"prompt": PROMPTS, "wanted": [None, None]}),
            },
            DataError,
            "'wants' is for none of the prompts of eval_dataset",
        ),
        (
            {
                "eval_rewards": "test_eval_rewards:held",
                "eval_strategy": "steps",
                "save_strategy": "best",
                "metric_for_best_model": "rewards/hold/mean",
            },
            ConfigError,
            "Did you mean 'rewards/held/mean'",
        ),
        ({"eval_rewards": "test_eval_rewards:held", "reward_route": "tilt[held=tilt]"}, RewardError, "'held', which"),
        ({"eval_rewards": "jpeg", "reward_weights": [1.0, 1.0, 1.0]}, RewardError, "3 entries for 2 rewards"),
    ],
)
def test_what_cannot_be_held_out(
    make_trainer: Make, tmp_path: Path, no_training: None, settings: dict[str, Any], error: Any, words: str
) -> None:
    """Found when the trainer is made, before the base is loaded."""
    with pytest.raises(error) as caught:
        make_trainer(tmp_path, "dm + 0.1*legibility", model="no/base", **({"eval_dataset": PROMPTS} | settings))
    assert words in str(caught.value)


def test_they_are_told_apart_from_the_runs_own() -> None:
    """Variants of one reward get the labels that they would have together, and weights of the run's are its own."""
    found = plan_rewards("dm + 0.5*hps:v2", [1.0, 2.0], "gradient", "hps:v2.1 + 3*jpeg")
    own, held_out = split_held_out(found, "hps:v2.1 + 3*jpeg")
    assert [(one.label, one.weight) for one in own] == [("dm", 1.0), ("hps:v2", 1.0)]
    assert [(one.label, one.weight) for one in held_out] == [("hps:v2.1", 0.0), ("jpeg", 0.0)]


def test_their_models_are_planned_for(small_teacher: str) -> None:
    """They stay on the device between evaluations."""
    args = RDMConfig(use_cpu=True, eval_rewards="clip", max_sequence_length=4)
    rows = {row.role: row.parameters for row in plan_memory(small_teacher, args, "dm").rows}
    assert rows["reward clip"] == next(iter(plan_rewards("clip"))).capabilities.parameters


@pytest.mark.parametrize("metric", ["loss", "rewards/flaky/mean"])
def test_a_skipped_reward_changes_no_meaning(
    make_trainer: Make, tmp_path: Path, metric: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`eval_loss` is always the first reward's; where that was skipped, the evaluation chooses no best."""
    trainer: Any = None

    def flaky(images: Any, prompts: Any) -> Any:
        if trainer.state.global_step == 1:
            raise ConnectionError("it is starting again")
        return images.mean(dim=(1, 2, 3))

    trainer = make_trainer(
        tmp_path,
        ["dm", (flaky, 0.0), ("legibility", 0.0)],
        eval_dataset=PROMPTS,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=False,
        reward_on_error="skip",
        logging_steps=10,
        max_steps=2,
    )
    trainer.train()
    first, second = [row for row in trainer.state.log_history if "eval_rewards/legibility/mean" in row]
    assert "eval_loss" not in first
    assert second["eval_loss"] == -second["eval_rewards/flaky/mean"]
    assert trainer.state.best_global_step == 2
    assert "reward 'flaky' was skipped: ConnectionError: it is starting again" in caplog.text


def test_a_reward_of_negative_weight_is_to_fall(make_trainer: Make, tmp_path: Path) -> None:
    """So the loss is its mean, and the watch does not take its fall for a failure."""
    trainer = make_trainer(tmp_path, "dm - 0.1*legibility", eval_dataset=PROMPTS)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_rewards/legibility/mean"]
    (watch,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, Watch)]
    assert (watch.trained, watch.minimized) == ([], ["legibility"])


def test_columns_are_looked_for_where_they_are_read(make_trainer: Make, tmp_path: Path) -> None:
    """In what is evaluated, and not for rewards that no evaluation asks."""
    data = Dataset.from_dict({"prompt": PROMPTS, "wanted": [1, 2]})
    trainer = make_trainer(tmp_path, ["dm", (wants, 0.0)], data)
    beside = Dataset.from_dict({"prompt": PROMPTS, "real": [None, None]})
    rewards = "dm + 0.1*adversarial[column=real] + 0*legibility"
    make_trainer(tmp_path, rewards, beside, eval_dataset=PROMPTS)  # the adversary judges no evaluation
    with pytest.raises(DataError, match="'wants' needs a column 'wanted', and what is evaluated has none"):
        trainer.evaluate(PROMPTS)
