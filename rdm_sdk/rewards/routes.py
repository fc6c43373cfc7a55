"""Which way each reward acts on the student: "tilt", or "tilt[ink=gradient]" for one that goes another way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from rdm_sdk.errors import ConfigError, RewardError, nearest
from rdm_sdk.rewards.base import Capabilities

Route = Literal["gradient", "advantage", "tilt"]
"""How a reward acts on the student: by its gradient at x_0, by advantages of its scores, or by tilting the teacher."""
ROUTES: tuple[Route, ...] = get_args(Route)


def parse_route(spec: str) -> tuple[Route, dict[str, Route]]:
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
    route, exceptions = _known(match[1], spec), dict[str, Route]()
    for item in match[2].split(",") if match[2] else ():
        name, equals, exception = (part.strip() for part in item.rpartition("="))
        if not (name and equals):
            raise ConfigError(f"reward_route={spec!r}: {item.strip()!r} is no exception; write 'name=route'")
        if name in exceptions:
            raise ConfigError(f"reward_route={spec!r} names {name!r} twice")
        exceptions[name] = _known(exception, spec)
    return route, exceptions


def _known(route: str, spec: str) -> Route:
    for known in ROUTES:
        if route == known:
            return known
    raise ConfigError(
        f"reward_route={spec!r} cannot be used: there is no route {route!r}.{nearest(route, ROUTES)} There are: "
        f"{', '.join(ROUTES)}"
    )


def choose_routes(declared: Mapping[str, Capabilities], spec: str) -> dict[str, Route]:
    """Return the route of every reward: what the spec says of it by name, or what suits it of the route of all.

    The route of all is for external rewards, that is, for those that train no critic.

    Args:
        declared: label of each reward to what it declares.
        spec: as `RDMConfig.reward_route`.

    Raises:
        ConfigError: the spec is malformed.
        RewardError: it names a reward that is not among these, or one that cannot go where it is sent.
    """
    route, exceptions = parse_route(spec)
    for name, exception in exceptions.items():
        if name not in declared:
            raise RewardError(
                f"reward_route={spec!r} names {name!r}, which is not among the rewards."
                f"{nearest(name, declared)} There are: {', '.join(declared)}"
            )
        reason = _objection(declared[name], exception)
        if reason:
            raise RewardError(f"reward_route={spec!r}: {name!r} {reason}")
    return {label: exceptions.get(label) or suitable_route(one, route) for label, one in declared.items()}


def suitable_route(declared: Capabilities, wanted: Route) -> Route:
    """Return the wanted route, or the one in its place for a reward that trains a critic or cannot take it.

    A reward without a gradient acts by its scores. One that computes its own field does not tilt the teacher, because
    its field is in the teacher's terms already (`guidance`).
    """
    if declared.trains or (wanted == "tilt" and declared.gradient == "field"):
        wanted = "gradient"
    return "advantage" if wanted == "gradient" and declared.gradient == "none" else wanted


def _objection(declared: Capabilities, route: Route) -> str:
    """Return why a reward cannot take a route, or an empty string if it can."""
    if route == "tilt" and declared.trains:
        return "has a critic and its own way; only external rewards can tilt the teacher"
    if route == "tilt" and declared.gradient == "field":
        return "computes its own field beside the teacher's, so it cannot tilt the teacher"
    if route == "gradient" and declared.gradient == "none":
        return "has no gradient; its scores can act by 'advantage' or 'tilt'"
    return ""
