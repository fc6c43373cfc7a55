"""What a step does at all, from rewards and settings alone; the step and its plan both go by it."""

from __future__ import annotations

import pytest

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
