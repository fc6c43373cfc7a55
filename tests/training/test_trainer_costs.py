"""Every network evaluation, critic update and reward call is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digit_runs import brightness
from torch import Tensor
from transformers import TrainerCallback

Make = Callable[..., Any]
Losses = Callable[[Any], list[dict[str, float]]]


# Four groups of two: a rollout to the end, which the critics learn from, costs 8 x 4 = 32 evaluations, and replaying
# the trained steps 8. Where critics have rollouts of their own, all stop where they are of use: each of the four steps
# comes once, which is 2 (1 + 2 + 3 + 4) = 20 for each of two critic updates, and 2 (0 + 1 + 2 + 3) = 12 for the
# student's, whose last evaluation is the replay. A critic update costs 8, judging another 8 (guided, the teacher's 16).
@pytest.mark.parametrize(
    ("settings", "student", "teacher", "fake", "critic"),
    [
        ({}, 40, 8, 24, 2),
        ({"guidance_scale": 1.5}, 40, 16, 24, 2),
        ({"critic_steps": 5}, 40, 8, 48, 5),
        ({"critic_rollouts": "fresh"}, 60, 8, 24, 2),
        ({"gradient_accumulation_steps": 2}, 80, 16, 48, 2),
        ({"log_images": 1}, 40, 8, 24, 2),  # pictures are no cost of training
        ({"gradient_checkpointing": True}, 40, 8, 24, 2),  # nor is a replay of activations a new evaluation
    ],
    ids=lambda value: ",".join(value) or "plain" if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_costs_are_exact(
    make_trainer: Make,
    tmp_path: Path,
    losses_of: Losses,
    settings: dict[str, Any],
    student: int,
    teacher: int,
    fake: int,
    critic: int,
) -> None:
    """Every network evaluation, critic update and reward call is counted, per optimizer step."""
    trainer = make_trainer(tmp_path, **({"num_generations": 2, "max_steps": 3} | settings))
    trainer.train()
    accumulation = settings.get("gradient_accumulation_steps", 1)
    for step, row in enumerate(losses_of(trainer), start=1):
        counted = {name: row[f"cost/{name}"] / step for name in ("critic_steps", "reward_calls")}
        counted |= {role: row[f"cost/{role}_forwards"] / step for role in ("student", "teacher", "fake")}
        assert counted == {
            "student": student,
            "teacher": teacher,
            "fake": fake,
            "critic_steps": critic,
            "reward_calls": 8 * accumulation,
        }
    assert len(losses_of(trainer)) == 3


def test_costs_with_a_scored_reward(make_trainer: Make, tmp_path: Path) -> None:
    """Scored rewards judge endpoints, so every trajectory is finished: 4 x 8 evaluations, then 8 to replay."""
    trainer = make_trainer(tmp_path, ["dm", brightness], num_generations=2, max_steps=1)
    trainer.train()
    costs = trainer.costs()
    assert costs["cost/student_forwards"] == 32 + 8
    assert costs["cost/reward_calls"] == 2 * 8


def test_no_critic_no_rollouts_for_it(make_trainer: Make, tmp_path: Path) -> None:
    """Also where critics would have rollouts of their own."""
    trainer = make_trainer(tmp_path, "legibility", critic_rollouts="fresh", critic_steps=5, max_steps=2)
    trainer.train()
    assert trainer.costs()["cost/rollouts"] == 2 * 8


def test_images_of_scored_endpoints_do_not_wait_for_the_optimizer(make_trainer: Make, tmp_path: Path) -> None:
    """They are let go of with the scores, also where the rollout is used again."""
    counted: list[int] = []

    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    class Look(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            gc.collect()
            tensors = [one for one in gc.get_objects() if type(one) is Tensor]  # no parameters
            counted.append(sum(one.ndim == 4 and one.shape[:2] == (8, 3) for one in tensors))

    settings = {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "callbacks": [Look()]}
    make_trainer(tmp_path, ["dm", (bright, 0.1)], **settings).train()
    assert counted == [0, 0]
