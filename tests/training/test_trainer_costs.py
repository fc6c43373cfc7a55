"""Every network evaluation, critic update and reward call is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digit_runs import brightness

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
