"""A reward of weight 0 judges the steps that are logged, and the run is the same bits however many these are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk import RDMTrainer
from rdm_sdk.training.callbacks import will_log

Make = Callable[..., RDMTrainer]


class Watched:
    """Scores brightness, and remembers how many optimizer steps were taken before it was asked."""

    __name__ = "watched"

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[int] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.steps.append(self.trainer.state.global_step + 1)
        return images.mean(dim=(1, 2, 3))


def run(make_trainer: Make, folder: Path, beside: list[Any], resume: bool = False, **settings: Any) -> Any:
    """Train with a watched reward; return the trainer and the steps at which it was asked."""
    watched = Watched()
    watched.trainer = trainer = make_trainer(
        folder,
        [*beside, (watched, 0.0)],
        **({"critic_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"} | settings),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watched.steps


def student(trainer: RDMTrainer) -> list[Tensor]:
    return [p.detach() for p in trainer.parameters_of("student")]


def means(trainer: RDMTrainer) -> dict[int, float]:
    """Return what was logged of the watched reward, by step."""
    return {
        row["step"]: row["rewards/watched/mean"]
        for row in trainer.state.log_history
        if "rewards/watched/mean" in row and "loss" in row
    }


@pytest.mark.parametrize("beside", [["dm"], ["dm", (lambda images, **_: images.mean((1, 2, 3)), 0.1)]])
def test_it_judges_the_steps_that_are_logged(make_trainer: Make, tmp_path: Path, beside: list[Any]) -> None:
    """Whether it judges with the others or finished trajectories; what is logged is that step's, and no bit changes."""
    settings = {"max_steps": 3, "logging_first_step": True}
    some, steps = run(make_trainer, tmp_path / "some", beside, logging_steps=2, **settings)
    every, all_steps = run(make_trainer, tmp_path / "every", beside, logging_steps=1, **settings)
    assert steps == [1, 2]
    assert all_steps == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(student(some), student(every), strict=True))
    assert means(some) == {step: mean for step, mean in means(every).items() if step in steps}


def test_what_advantages_lack_is_not_its_lack(make_trainer: Make, tmp_path: Path) -> None:
    """A reward that is only watched acts by no advantages, so its constant scores leave none of them empty."""

    def mine(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def constant(images: Tensor, prompts: list[str]) -> list[float]:
        return [1.0] * len(prompts)

    trainer = make_trainer(tmp_path, ["dm", (mine, 0.1), (constant, 0.0)], max_steps=1, logging_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rewards/constant/zero_std"] == 1.0
    assert row["frac_reward_zero_std"] == row["rewards/mine/zero_std"] == 0.0


@pytest.mark.slow
def test_a_resumed_run_logs_the_same(make_trainer: Make, tmp_path: Path) -> None:
    """From a step between two logs."""
    whole, _ = run(make_trainer, tmp_path / "whole", ["dm"], max_steps=4, logging_steps=2)
    saving = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    run(make_trainer, tmp_path / "parts", ["dm"], max_steps=3, **saving)
    resumed, steps = run(make_trainer, tmp_path / "parts", ["dm"], resume=True, max_steps=4, **saving)
    assert steps == [4]
    assert means(resumed) == means(whole)


def test_a_tilt_sees_the_same_noise_whoever_is_watched(make_trainer: Make, tmp_path: Path) -> None:
    """Watched `dm` asks for the re-noised samples before the tilt does, and its random numbers are put back."""
    settings = {"reward_route": "tilt", "max_steps": 3, "learning_rate": 1e-3}
    ends = []
    for steps in (1, 3):
        trainer = make_trainer(tmp_path / str(steps), "legibility + 0*dm", logging_steps=steps, **settings)
        trainer.train()
        ends.append(student(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Mine:
    """A weighting of the user's, which sees what every reward does."""

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def weigh(self, targets: Mapping[str, float], statistics: Mapping[str, Any], step: int) -> dict[str, float]:
        self.seen.append(dict(statistics))
        return dict(targets)

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass


def test_a_weighting_of_the_users_sees_it_at_every_step(make_trainer: Make, tmp_path: Path) -> None:
    """It may go by its scores; ours do not."""
    for weighting, expected in ((Mine(), [1, 2]), ("balance", [])):
        settings = {"max_steps": 2, "logging_steps": 10, "weighting": weighting}
        trainer, steps = run(make_trainer, tmp_path / type(weighting).__name__, ["dm"], **settings)
        assert steps == expected
    assert trainer.step.weighting.state_dict().keys() == {"pull/dm"}


def test_a_weighting_of_the_users_sees_its_scores(make_trainer: Make, tmp_path: Path) -> None:
    """Whether it has a gradient, which nobody asks for, or advantages."""

    def brightness(images: Tensor, **_: object) -> Tensor:
        return images.mean((1, 2, 3))

    mine = Mine()
    rewards = [("dm", 1.0), (brightness, 0.0), ("legibility", 0.0)]
    make_trainer(tmp_path, rewards, weighting=mine, max_steps=2, logging_steps=10).train()
    assert mine.seen[0] == {}
    assert mine.seen[1].keys() == {"dm", "legibility", "brightness"}
    assert mine.seen[1]["legibility"].pull == 0.0 < mine.seen[1]["legibility"].score
    assert mine.seen[1]["brightness"].score > 0


def test_scores_that_later_uses_log_are_there(make_trainer: Make, tmp_path: Path) -> None:
    """A rollout is scored when it is made, whichever of its uses is logged."""
    beside = ["dm", (lambda images, **_: images.mean((1, 2, 3)), 0.1)]
    settings = {"num_iterations": 2, "min_effective_sample_size": 0.0, "logging_steps": 2, "max_steps": 4}
    trainer, steps = run(make_trainer, tmp_path, beside, **settings)
    assert steps == [1, 3]
    assert means(trainer).keys() == {2, 4}


def test_what_counts_may_be_skipped_meanwhile(make_trainer: Make, tmp_path: Path) -> None:
    """With the one reward that teaches skipped, a step without a log goes on as one with a log does."""

    def failing(images: Tensor, **_: object) -> Tensor:
        raise OSError("no answer")

    trainer, steps = run(make_trainer, tmp_path, [(failing, 1.0)], reward_on_error="skip", max_steps=2, logging_steps=2)
    assert steps == [2]
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("strategy", "first", "expected"),
    [("steps", False, [3, 6]), ("steps", True, [1, 3, 6]), ("epoch", False, [1, 2, 3, 4, 5, 6]), ("no", False, [])],
)
def test_which_steps_are_logged(strategy: str, first: bool, expected: list[int]) -> None:
    """Trainer's own rule; at epochs, any step may be the last."""
    args = SimpleNamespace(logging_strategy=strategy, logging_first_step=first)
    steps = [step for step in range(1, 7) if will_log(args, SimpleNamespace(global_step=step - 1, logging_steps=3))]
    assert steps == expected
