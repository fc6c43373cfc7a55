"""GenEval's rules (arXiv 2310.11513): which objects a prompt asks for, and whether those found are what it asks for.

Rules and numbers are those of evaluation/evaluate_images.py of djghosh13/geneval (MIT license); the partial score is
`evaluate_reward` of reward_server/gen_eval.py of yifan123/reward-server, with the differences that `partial` names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rdm_sdk import RewardError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16
"""Objects of a kind that are looked at, at most: the surest ones."""
_REACH = 0.1
"""The share of two objects' sizes that their centers must be apart for one to be beside the other."""


class Box(NamedTuple):
    """An object that was found, in pixels from the upper left."""

    left: float
    top: float
    right: float
    bottom: float
    sureness: float


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for (or must not show): so many objects of a kind, of a color, beside earlier ones."""

    kind: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None
    """The place, in the list, of what the relation is to."""


Found = Mapping[str, Sequence[Box]]
"""Per kind, the objects that were found, the surest first."""
Colors = Callable[[str, Sequence[Box]], Sequence[str]]
"""Maps a kind and objects of it to their colors."""


def parse(entry: object, column: str) -> list[Wanted]:
    """Return what an entry of the column `include` or `exclude` asks for.

    Args:
        entry: a list of mappings with `class`, `count` and perhaps `color` and `position` (relation, place), as in
            GenEval's metadata, or such a list as JSON text; keys with the value None are as good as missing.
        column: the column's name in errors.

    Raises:
        RewardError: it is no such list; says what is wrong in which entry.
    """
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except ValueError as error:
            raise RewardError(f"geneval: the column {column!r} holds {entry!r}, which is no JSON: {error}") from error
    if not isinstance(entry, list) or not all(isinstance(clause, Mapping) for clause in entry):
        raise RewardError(
            f'geneval: an entry of the column {column!r} must be a list such as [{{"class": "dog", "count": 2}}], or '
            f"that as JSON text; got {entry!r}"
        )
    return [_clause(clause, place, column) for place, clause in enumerate(entry)]


def _clause(clause: Mapping[str, Any], place: int, column: str) -> Wanted:
    given = {key: value for key, value in clause.items() if value is not None}

    def require(fits: bool, what: str) -> None:
        if not fits:
            raise RewardError(f"geneval: in the column {column!r}, {dict(given)!r}: {what}")

    require(not given.keys() - {"class", "count", "color", "position"}, "takes class, count, color and position only")
    kind, count, color = given.get("class"), given.get("count"), given.get("color")
    require(isinstance(kind, str) and bool(kind.strip()), "class must be the name of a kind of object")
    require(type(count) is int and count >= 1, "count must be a whole number of 1 or more")
    require(color is None or color in COLORS, f"color must be one of {', '.join(COLORS)}")
    relation = target = None
    if "position" in given:
        position = given["position"]
        require(
            isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS,
            f"position must be a pair of {', '.join(map(repr, RELATIONS))} and the place of an earlier entry",
        )
        relation, target = position
        require(type(target) is int and 0 <= target < place, f"position must name an earlier entry, below {place}")
    return Wanted(str(kind).strip(), int(count or 0), color, relation, target)


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, whose sides count both end pixels."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom))
    whole = area(*a[:4]) + area(*b[:4]) - shared
    return shared / whole if whole else 0.0


def kept(boxes: Sequence[Box], threshold: float, max_overlap: float) -> list[Box]:
    """Return the boxes that count as objects, the surest first.

    Those surer than `threshold`, 16 at most, without those that overlap a surer one by `max_overlap` or more (1 keeps
    all).
    """
    sure = sorted((box for box in boxes if box.sureness > threshold), key=lambda box: -box.sureness)[:MAX_OBJECTS]
    found: list[Box] = []
    for box in sure:
        if max_overlap == 1 or all(overlap(box, other) < max_overlap for other in found):
            found.append(box)
    return found


def relations(a: Box, b: Box) -> set[str]:
    """Return how a lies to b: where their centers are apart by more than a tenth of both sizes, and mostly that way."""
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (a[low] + a[high] - b[low] - b[high]) / 2
        reach = _REACH * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - reach, 0), offset))
    if all(abs(value) < 1e-3 for value in beyond):
        return set()
    right, down = (value / math.hypot(*offsets) for value in beyond)
    tests = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, holds in tests.items() if holds}


def strict(include: Sequence[Wanted], exclude: Sequence[Wanted], found: Found, colors: Colors) -> float:
    """Return 1 if all is as asked for, else 0: GenEval's own verdict.

    More objects than asked for do no harm unless `exclude` says so; color and position are those of the surest ones.
    """
    matched: list[Sequence[Box] | None] = []
    for wanted in include:
        objects = found.get(wanted.kind, ())[: wanted.count]
        fits = len(objects) == wanted.count
        if fits and wanted.color is not None:
            fits = list(colors(wanted.kind, objects)).count(wanted.color) == wanted.count
        matched.append(objects if fits and _placed(wanted, objects, matched) else None)
    spared = all(len(found.get(unwanted.kind, ())) < unwanted.count for unwanted in exclude)
    return float(spared and None not in matched)


def partial(include: Sequence[Wanted], exclude: Sequence[Wanted], found: Found, colors: Colors) -> float:
    """Return the mean, in [0, 1], of how well each count, color and position asked for is met.

    A count scores 1 - |count - found| / count, and so does the number of objects of the color; a position 1 or 0. Where
    the count is off, color or position score 0, once. This is Flow-GRPO's partial reward (arXiv 2505.05470) with three
    differences: no part is below 0 (there, many objects too many are), a position that is wrong scores 0 (there, a 0
    and a 1), and a kind that is in `exclude` alone scores 1 or 0 (there, it is not looked at).
    """
    parts: list[float] = []
    matched: list[Sequence[Box] | None] = []
    for wanted in include:
        objects = found.get(wanted.kind, ())
        parts.append(_share(len(objects), wanted.count))
        fits = len(objects) == wanted.count
        if not fits and (wanted.color is not None or wanted.relation is not None):
            parts.append(0.0)
        if fits and wanted.color is not None:
            colored = list(colors(wanted.kind, objects)).count(wanted.color)
            parts.append(_share(colored, wanted.count))
            fits = colored == wanted.count
        if fits and wanted.relation is not None:
            fits = _placed(wanted, objects, matched)
            parts.append(float(fits))
        matched.append(objects if fits else None)
    asked = {wanted.kind for wanted in include}
    others = [unwanted for unwanted in exclude if unwanted.kind not in asked]
    parts += [float(len(found.get(unwanted.kind, ())) < unwanted.count) for unwanted in others]
    return sum(parts) / len(parts)


def _share(found: int, count: int) -> float:
    return max(1 - abs(count - found) / count, 0.0)


def _placed(wanted: Wanted, objects: Sequence[Box], matched: Sequence[Sequence[Box] | None]) -> bool:
    """Whether all objects lie to all those of the target as asked for; also if nothing was asked for."""
    if wanted.relation is None or wanted.target is None:
        return True
    targets = matched[wanted.target]
    return targets is not None and all(wanted.relation in relations(a, b) for a in objects for b in targets)
