"""From what a user writes ("dm + 0.5*legibility", a callable, a list) to validated reward terms."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from typing import TypeAlias

from rdm_sdk.errors import RewardError, nearest
from rdm_sdk.rewards.base import CallableReward, Reward

BUILTIN_REWARDS = {
    "dm": "rdm_sdk.rewards.dm:DistributionMatching",
    "legibility": "rdm_sdk.rewards.legibility:Legibility",
}
"""Names to classes, as dotted strings, so that listing them imports nothing heavy."""

RewardLike: TypeAlias = str | Reward | Callable[..., object]
RewardFuncs: TypeAlias = RewardLike | Sequence[RewardLike] | None

_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*(?:(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?(?P<name>[A-Za-z][\w/-]*)\s*"
)


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a run with its weight."""

    name: str
    reward: Reward
    weight: float


def resolve_rewards(reward_funcs: RewardFuncs, weights: Sequence[float] | None = None) -> list[RewardTerm]:
    """Turn `reward_funcs` into terms; None means distribution matching alone.

    Args:
        reward_funcs: a spec such as "dm + 0.5*legibility", a callable, a `Reward`, or a list of them.
        weights: one weight per term, in order; they multiply the weights of the specs.

    Raises:
        RewardError: an unknown name, a malformed spec, two rewards of one name, or weights that do not fit.
    """
    if reward_funcs is None:
        reward_funcs = "dm"
    items = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    terms = [term for item in items for term in _terms(item)]
    if not terms:
        raise RewardError("no rewards given: pass at least one, such as reward_funcs='dm'")
    if weights is not None:
        if len(weights) != len(terms):
            raise RewardError(f"reward_weights has {len(weights)} entries for {len(terms)} rewards")
        terms = [RewardTerm(t.name, t.reward, t.weight * w) for t, w in zip(terms, weights, strict=True)]
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RewardError(f"two rewards have the name {twice[0]!r}; give one of them another name")
    if not all(isfinite(term.weight) for term in terms):
        raise RewardError("reward weights must be finite numbers")
    return terms


def _terms(item: object) -> list[RewardTerm]:
    if isinstance(item, str):
        return [RewardTerm(name, load_reward(name), weight) for name, weight in parse_spec(item)]
    if isinstance(item, Reward):
        return [RewardTerm(item.name, item, 1.0)]
    if callable(item) and not isinstance(item, type):
        reward = CallableReward(item)
        return [RewardTerm(reward.name, reward, 1.0)]
    raise RewardError(f"a reward is a name, a callable or a Reward object; got {item!r}")


def parse_spec(spec: str) -> list[tuple[str, float]]:
    """Parse a signed sum such as "dm + 0.5*legibility" into (name, weight) pairs.

    Raises:
        RewardError: the spec is malformed; the message names the column.
    """
    terms: list[tuple[str, float]] = []
    position = 0
    while position < len(spec):
        match = _TERM.match(spec, position)
        if match is None or (terms and match["sign"] is None):
            raise RewardError(
                f"cannot read the reward spec {spec!r} at column {position + 1}; expected a sum of terms such as "
                "'dm + 0.5*legibility'"
            )
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            raise RewardError(f"{match['weight']!r} in the reward spec {spec!r} is not a number") from None
        terms.append((match["name"], -weight if match["sign"] == "-" else weight))
        position = match.end()
    if not terms:
        raise RewardError("the reward spec is empty; write a sum of terms such as 'dm + 0.5*legibility'")
    return terms


def load_reward(name: str) -> Reward:
    """Create the built-in reward of that name."""
    if name not in BUILTIN_REWARDS:
        raise RewardError(
            f"unknown reward {name!r}.{nearest(name, BUILTIN_REWARDS)} Known rewards: {', '.join(BUILTIN_REWARDS)}"
        )
    module, attribute = BUILTIN_REWARDS[name].split(":")
    reward: Reward = getattr(import_module(module), attribute)()
    return reward
