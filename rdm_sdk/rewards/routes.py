"""Which way each reward acts on the student: "tilt", or "tilt[ink=gradient]" for one that goes another way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rdm_sdk.errors import ConfigError, RewardError, nearest
from rdm_sdk.rewards.resolve import RewardFuncs, WeightedReward, declare_rewards, resolve_rewards
from rdm_sdk.rewards.scored import Scored

ROUTES = ("gradient", "advantage", "tilt")


def parse_route(spec: str) -> tuple[str, dict[str, str]]:
    """Return the route of all rewards that are not named, and the routes of those that are.

    Raises:
        ConfigError: it is no such spec, or a route does not exist.
    """
    match = re.fullmatch(r"\s*([^\[\]\s]+)\s*(?:\[(.+)\])?\s*", spec)
    if match is None:
        raise ConfigError(
            f"reward_route={spec!r} cannot be read; write a route, with exceptions in brackets if some reward takes "
            "another: 'tilt[ink=gradient]'"
        )
    route, exceptions = _known(match[1], spec), {}
    for item in match[2].split(",") if match[2] else ():
        name, equals, own = (part.strip() for part in item.rpartition("="))
        if not (name and equals):
            raise ConfigError(f"reward_route={spec!r}: {item.strip()!r} is no exception; write 'name=route'")
        if name in exceptions:
            raise ConfigError(f"reward_route={spec!r} names {name!r} twice")
        exceptions[name] = _known(own, spec)
    return route, exceptions


def _known(route: str, spec: str) -> str:
    if route not in ROUTES:
        raise ConfigError(
            f"reward_route={spec!r} cannot be used: there is no route {route!r}.{nearest(route, ROUTES)} There are: "
            f"{', '.join(ROUTES)}"
        )
    return route


def routed(rewards: Sequence[WeightedReward], spec: str) -> list[WeightedReward]:
    """Send every external reward, that is every one that trains no critic, down a route.

    "gradient" leaves each as it is, "advantage" takes gradients away, "tilt" lets a reward tilt the teacher unless it
    computes its own field, which is in the teacher's terms already (`guidance`).

    Raises:
        ConfigError: the spec is malformed.
        RewardError: it names a reward that is not among these, or one that cannot go where it is sent.
    """
    route, exceptions = parse_route(spec)
    _check(rewards, exceptions, spec)
    return [_sent(own, exceptions.get(own.label, route)) for own in rewards]


def load_routed(
    reward_funcs: RewardFuncs, weights: Sequence[float] | Mapping[str, float] | None, spec: str
) -> list[WeightedReward]:
    """Resolve rewards and send them down their routes; a wrong spec is found before any reward's model is loaded.

    Raises:
        ConfigError, RewardError: as `routed` and `resolve_rewards`.
    """
    routed(declare_rewards(reward_funcs, weights), spec)
    return routed(resolve_rewards(reward_funcs, weights), spec)


def _sent(own: WeightedReward, route: str) -> WeightedReward:
    declared = own.reward.capabilities
    if declared.trains or route == "gradient":
        return own
    if route == "tilt":
        return replace(own, tilts=declared.gradient != "field")
    return replace(own, reward=Scored(own.reward)) if own.has_gradient else own


def _check(rewards: Sequence[WeightedReward], exceptions: Mapping[str, str], spec: str) -> None:
    known = {own.label: own for own in rewards}
    for name, route in exceptions.items():
        if name not in known:
            raise RewardError(
                f"reward_route={spec!r} names {name!r}, which is not among the rewards.{nearest(name, known)} "
                f"There are: {', '.join(known)}"
            )
        own = known[name]
        if own.reward.capabilities.trains:
            why = "has a critic and its own way; only external rewards are sent down a route"
        elif route == "gradient" and not own.has_gradient:
            why = "has no gradient; its scores can act by 'advantage' or 'tilt'"
        elif route == "tilt" and own.reward.capabilities.gradient == "field":
            why = "computes its own field beside the teacher's, so it cannot tilt the teacher"
        else:
            continue
        raise RewardError(f"reward_route={spec!r}: {name!r} {why}")
