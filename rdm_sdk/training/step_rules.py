"""What a run's step does at all, and when: pure functions of rewards and settings, for the step and for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.rewards.resolve import RunReward

SomeReward = TypeVar("SomeReward", bound=RunReward)


def uses_fields(rewards: Sequence[RunReward]) -> bool:
    """Whether a reward that counts moves x_0, by its gradient or by tilting the teacher."""
    return any(reward.weight and reward.route != "advantage" for reward in rewards)


def uses_advantages(rewards: Sequence[RunReward]) -> bool:
    """Whether a reward that counts acts by advantages of its scores."""
    return any(reward.weight and reward.route == "advantage" for reward in rewards)


def judged_at_endpoints(rewards: Sequence[SomeReward]) -> list[SomeReward]:
    """Return the rewards that score finished trajectories, before there is a graph: all that act so, if one counts."""
    return [reward for reward in rewards if reward.route == "advantage"] if uses_advantages(rewards) else []


def judged_at_replay(rewards: Sequence[SomeReward]) -> list[SomeReward]:
    """Return the rewards that judge what the student predicts at the replayed step, while its graph waits for them."""
    return [reward for reward in rewards if reward.route != "advantage" or not uses_advantages(rewards)]


def is_guided(family: ModelFamily, guidance_scale: float) -> bool:
    """Whether the teacher's predictions with and without the prompt are combined to guided ones."""
    return family.guidance == "classifier-free" and guidance_scale != 1.0
