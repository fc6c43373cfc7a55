"""What a run's step does at all, and when: pure functions of rewards and settings, for the step and for its plan."""

from __future__ import annotations

from collections.abc import Sequence

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.training.settings import MethodSettings


def acts(rewards: Sequence[WeightedReward], pathwise: bool) -> bool:
    """Whether a reward that counts acts by its gradient (or by its scores)."""
    return any(reward.weight and reward.pathwise == pathwise for reward in rewards)


def judged_at_endpoints(rewards: Sequence[WeightedReward]) -> list[WeightedReward]:
    """Return the rewards that score finished trajectories, before there is a graph: all that act so, if one counts."""
    return [reward for reward in rewards if not reward.pathwise] if acts(rewards, pathwise=False) else []


def judged_at_replay(rewards: Sequence[WeightedReward]) -> list[WeightedReward]:
    """Return the rewards that judge what the student predicts at the replayed step, while its graph waits for them."""
    return [reward for reward in rewards if reward.pathwise or not acts(rewards, pathwise=False)]


def is_guided(family: ModelFamily, guidance_scale: float) -> bool:
    """Whether the teacher's predictions with and without the prompt are combined to guided ones."""
    return family.guidance == "classifier-free" and guidance_scale != 1.0


def steps_stored(settings: MethodSettings) -> int:
    """Return how many optimizer steps' rollouts wait to be used again, at most."""
    return settings.steps_per_generation if settings.num_iterations > 1 else 0
