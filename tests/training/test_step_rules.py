"""What a step does at all, from rewards and settings alone; the step and its plan both go by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_sdk import RDMConfig
from rdm_sdk.rewards.resolve import plan_rewards
from rdm_sdk.training import step_rules


def brightness(images: object, prompts: object) -> list[float]:
    """Stand for a reward that has scores and no gradient."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("rewards", "at_endpoints", "at_replay"),
    [
        (["dm"], [], ["dm"]),
        (["dm", brightness], ["brightness"], ["dm"]),
        ([brightness], ["brightness"], []),
        (["dm", (brightness, 0.0)], [], ["dm", "brightness"]),  # watched alone, it needs no finished trajectory
    ],
)
def test_who_judges_when(rewards: list[object], at_endpoints: list[str], at_replay: list[str]) -> None:
    """Scores that count are of finished samples; a reward that is only watched judges with the others."""
    planned = plan_rewards(rewards)
    assert [reward.label for reward in step_rules.judged_at_endpoints(planned)] == at_endpoints
    assert [reward.label for reward in step_rules.judged_at_replay(planned)] == at_replay
    assert step_rules.uses_advantages(planned) == bool(at_endpoints)
    assert step_rules.uses_fields(planned) == ("dm" in at_replay)


@pytest.mark.parametrize(("num_iterations", "reuse_interval", "stored"), [(1, 1, 0), (2, 1, 1), (2, 3, 3)])
def test_what_waits_to_be_used_again(
    small_config: Callable[..., RDMConfig], tmp_path: Path, num_iterations: int, reuse_interval: int, stored: int
) -> None:
    """Nothing waits where a rollout is used once."""
    config = small_config(tmp_path, num_iterations=num_iterations, reuse_interval=reuse_interval)
    assert step_rules.steps_stored(config) == stored
