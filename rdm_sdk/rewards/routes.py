"""Which way each reward acts on the student: "tilt", or "tilt[ink=gradient]" for one that goes another way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from rdm_sdk.errors import ConfigError, RewardError, nearest, shown
from rdm_sdk.rewards.base import Capabilities
from rdm_sdk.rewards.grammar import Parser
from rdm_sdk.rewards.spec import make_term

Route = Literal["gradient", "advantage", "tilt"]
"""How a reward acts on the student: by its gradient at x_0, by advantages of its scores, or by tilting the teacher."""
ROUTES: tuple[Route, ...] = get_args(Route)


_WORD = re.compile(r"[^\[\]=,\s]+")
_HINT = "Write a route, with exceptions in brackets if some reward takes another: 'tilt[ink=gradient]'"


def parse_route(spec: str) -> tuple[Route, dict[str, Route]]:
    """Return the route of all rewards that are not named, and the routes of those that are.

    Raises:
        ConfigError: it is no such spec, or a route does not exist; the message shows the problem and its column.
    """
    parser = Parser(spec, "reward_route=", _HINT, ConfigError)
    route = _route(parser)
    exceptions: dict[str, Route] = {}
    if parser.mark("["):
        while True:
            name, exception = _exception(parser)
            if name in exceptions:
                parser.fail(f"it names {shown(name, 60)} twice")
            exceptions[name] = exception
            if parser.mark("]"):
                break
            if not parser.mark(","):
                parser.fail("expected ',' or ']' here")
    if not parser.at_end():
        parser.fail("expected the end here" if exceptions else "expected '[' or the end here")
    return route, exceptions


def _exception(parser: Parser) -> tuple[str, Route]:
    """Read "name=route"."""
    parser.skip_space()
    start = parser.position
    reference = parser.reference()
    try:
        name = make_term(vars(reference)).reference
    except RewardError as error:
        parser.fail(str(error), at=start)
    if not parser.mark("="):
        parser.fail(f"{shown(name, 60)} is no exception; write 'name=route'")
    return name, _route(parser)


def _route(parser: Parser) -> Route:
    parser.skip_space()
    start = parser.position
    word = parser.take(_WORD)
    if word is None:
        parser.fail(f"expected a route here, one of {', '.join(ROUTES)}")
    found: Route | None = next((known for known in ROUTES if known == word), None)
    if found is None:
        offered = f"{nearest(word, ROUTES)} There are: {', '.join(ROUTES)}"
        parser.fail(f"there is no route {shown(word, 60)}.{offered}", at=start)
    return found


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
                f"reward_route={shown(spec)} names {shown(name, 60)}, which is not among the rewards."
                f"{nearest(name, declared)} There are: {', '.join(declared)}"
            )
        reason = _objection(declared[name], exception)
        if reason:
            raise RewardError(f"reward_route={shown(spec)}: {name!r} {reason}")
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
