"""GenEval's rules, on boxes that are written down."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdm_reward_geneval.rules import (
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    Box,
    kept,
    overlap,
    parse,
    partial,
    relations,
    strict,
)

from rdm_sdk import RewardError

BOXES = st.builds(
    lambda x, y, w, h, sure: Box(x, y, x + w, y + h, sure),
    *[st.floats(0, 500)] * 2,
    *[st.floats(1, 300)] * 2,
    st.floats(0, 1),
)


def box(x, y, size=10, sure=0.9):
    return Box(x, y, x + size, y + size, sure)


def red(kind, objects):
    return ["red"] * len(objects)


def both(include, found, exclude=(), colors=red):
    """The strict and the partial score."""
    wanted, unwanted = parse(include, "include"), parse(list(exclude), "exclude")
    return strict(wanted, unwanted, found, colors), pytest.approx(partial(wanted, unwanted, found, colors))


def some(count, *, step=50):
    return [box(step * place, 0) for place in range(count)]


@pytest.mark.parametrize(
    ("found", "expected"), [(0, (0, 0)), (1, (0, 0.5)), (2, (1, 1)), (3, (0, 0.5)), (4, (0, 0)), (9, (0, 0))]
)
def test_counts(found, expected):
    """GenEval's counting prompts: as many as asked for, and not one more; the share that is off costs in part."""
    include, exclude = [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}]
    assert both(include, {"dog": some(found)}, exclude) == expected


def test_more_than_asked_for():
    """Without `exclude` more of a kind are as good for the verdict, as in GenEval, but not for the partial score."""
    assert both([{"class": "dog", "count": 1}], {"dog": some(2)}) == (1, 0)
    assert both([{"class": "dog", "count": 2}], {"dog": some(3), "cat": some(5)}) == (1, 0.5)


def test_kinds_to_leave_out():
    """A kind that must not be there."""
    include, exclude = [{"class": "dog", "count": 1}], [{"class": "cat", "count": 1}]
    assert both(include, {"dog": some(1)}, exclude) == (1, 1)
    assert both(include, {"dog": some(1), "cat": some(1)}, exclude) == (0, 0.5)


def test_colors():
    """Color is judged where the count is right; of several objects, each counts."""
    include = [{"class": "dog", "count": 2, "color": "red"}]
    assert both(include, {"dog": some(2)}) == (1, 1)
    assert both(include, {"dog": some(2)}, colors=lambda kind, objects: ["red", "blue"]) == (0, 0.75)
    assert both(include, {"dog": some(1)}) == (0, 0.25)
    seen = []
    both(
        [{"class": "dog", "count": 1, "color": "red"}], {"dog": some(3)}, colors=lambda k, o: seen.append(o) or ["red"]
    )
    assert seen == [some(3)[:1]]  # the surest one, and none by the partial score, whose count is off


def test_positions():
    """A position is to the objects of an earlier entry, which must have been right itself."""
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    assert both(include, {"dog": [box(100, 0)], "cat": [box(0, 0)]}) == (1, 1)
    assert both(include, {"dog": [box(0, 0)], "cat": [box(100, 0)]}) == (0, 2 / 3)
    assert both(include, {"cat": [box(0, 0)]}) == (0, 1 / 3)
    assert both(include, {"dog": [box(100, 0)]}) == (0, 1 / 3)
    colored = [include[0] | {"color": "blue"}, include[1]]
    assert both(colored, {"dog": [box(100, 0)], "cat": [box(0, 0)]}) == (0, 2 / 4)


def test_every_object_must_be_placed():
    """Of several objects, all must lie as asked for to all of the target."""
    include = [{"class": "boat", "count": 1}, {"class": "bird", "count": 2, "position": ["above", 0]}]
    boat = [box(50, 100)]
    assert both(include, {"boat": boat, "bird": [box(40, 0), box(60, 0)]}) == (1, 1)
    assert both(include, {"boat": boat, "bird": [box(40, 0), box(60, 200)]}) == (0, 2 / 3)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (box(0, 0), box(100, 0), {"left of"}),
        (box(100, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 100), {"above"}),
        (box(0, 100), box(0, 0), {"below"}),
        (box(0, 0), box(100, 100), {"left of", "above"}),
        (box(0, 0), box(100, 20), {"left of"}),
        (box(0, 0), box(0, 0), set()),
        (box(0, 0), box(2, 0), set()),  # centers 2 apart, and a tenth of both sizes is 2
        (box(0, 0), box(3, 0), set()),  # (3 - 2) / 3 is not above a half
        (box(0, 0), box(5, 0), {"left of"}),
    ],
)
def test_relations(a, b, expected):
    """Worked out by hand from GenEval's formula."""
    assert relations(a, b) == expected


@given(BOXES, BOXES)
def test_relations_are_antisymmetric(a, b):
    """What lies left of another has it on its right, and so on; never both, never more than two."""
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    there, back = relations(a, b), relations(b, a)
    assert {opposite[relation] for relation in there} == back
    assert len(there) <= 2
    assert not there & back


@given(st.lists(BOXES, max_size=30), st.floats(0, 1), st.sampled_from([0.3, 0.5, 1]))
def test_kept(boxes, threshold, most):
    """Sure ones, the surest first, at most 16, that do not overlap; among alike boxes the surest stays."""
    found = kept(boxes, threshold, most)
    assert all(box.sureness > threshold for box in found)
    assert [box.sureness for box in found] == sorted((box.sureness for box in found), reverse=True)
    assert len(found) <= MAX_OBJECTS
    assert bool(found) == any(box.sureness > threshold for box in boxes)
    if most < 1:
        assert all(overlap(a, b) < most for a, b in product(found, found) if a is not b)
    assert overlap(box(0, 0), box(0, 0)) == 1
    assert overlap(box(0, 0, 9), box(5, 0, 9)) == pytest.approx(50 / 150)


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from(COLORS), st.sampled_from(COLORS))
def test_scores_lie_in_range(dogs, cats, color, seen):
    """Both scores lie in [0, 1], and what is partly right in all parts is right."""
    include = [{"class": "dog", "count": 2, "color": color}, {"class": "cat", "count": 1, "position": ["below", 0]}]
    found = {"dog": some(dogs), "cat": [box(0, 300)] * cats}
    verdict, part = both(include, found, colors=lambda kind, objects: [seen] * len(objects))
    assert verdict in (0, 1)
    assert 0 <= part.expected <= 1
    assert part.expected < 1 or verdict == 1


def test_forms_of_entries():
    """Lists, JSON text, and the None that table formats put where a key is missing."""
    clauses = [{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "color": "red", "position": ["above", 0]}]
    filled = [{"color": None, "position": None} | clause for clause in clauses]
    assert parse(clauses, "include") == parse(json.dumps(clauses), "include") == parse(filled, "include")
    assert parse([], "include") == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a dog", r"column 'include' holds 'a dog', which is no JSON"),
        (3, r"must be a list such as .* got 3"),
        (["dog"], r"must be a list such as"),
        ([{"count": 1}], r"class must be"),
        ([{"class": "dog"}], r"count must be"),
        ([{"class": "dog", "count": 0}], r"count must be"),
        ([{"class": "dog", "count": True}], r"count must be"),
        ([{"class": "dog", "count": 1, "color": "mauve"}], r"color must be one of red, "),
        ([{"class": "dog", "count": 1, "colour": "red"}], r"takes class, count, color and position only"),
        ([{"class": "dog", "count": 1, "position": ["left of", 0]}], r"must name an earlier entry, below 0"),
        ([{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}], r"pair of 'left of'"),
        ([{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": "left of"}], r"pair of 'left of'"),
    ],
)
def test_wrong_entries(entry, message):
    """What is not GenEval's form is named, with the entry."""
    with pytest.raises(RewardError, match=message):
        parse(entry, "include")
