"""Which text is asked for, and how far another one is from it."""

# ruff: noqa: RUF001 - typographic quotes are what is tested

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdm_reward_ocr.text import edit_distance, folded, quoted, similarity

QUOTES = [
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("‚", "‘"),
    ("«", "»"),
    ("‹", "›"),
    ("„", "“"),
    ("„", "”"),
    ("「", "」"),
    ("『", "』"),
]
LETTERS = st.text("abcé東 !?.&-", min_size=1).filter(str.strip)
SHORT = st.text("abcd", max_size=6)


@cache
def by_definition(a, b):
    """The distance by its definition, over the last letters."""
    if not a or not b:
        return len(a) + len(b)
    replaced = by_definition(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(by_definition(a[:-1], b) + 1, by_definition(a, b[:-1]) + 1, replaced)


@given(SHORT, SHORT)
def test_distance_is_the_definition(a, b):
    """The distance is that of the recursive definition."""
    assert edit_distance(a, b) == by_definition(a, b)


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_distance_is_a_metric(a, b, c):
    """It is 0 for equal texts alone, the same both ways, and no detour is shorter."""
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@given(st.text(max_size=12), st.text(max_size=12))
def test_similarity(a, b):
    """It lies in [0, 1], is the same both ways, and 1 for texts that are equal once folded, and for no others."""
    value = similarity(a, b)
    assert 0 <= value <= 1
    assert value == similarity(b, a)
    assert (value == 1) == (folded(a) == folded(b))
    assert similarity(a, "") == (not folded(a))


@pytest.mark.parametrize(
    ("asked", "read", "expected"),
    [
        ("OPEN", "open", 1),
        ("Open 24 hours", "OPEN24\nHOURS", 1),
        ("don’t – stop", "don't - stop", 1),
        ("50％ off！", "50% off!", 1),
        ("STRASSE", "Straße", 1),
        ("open", "oven", 0.75),
        ("open", "open air", 4 / 7),
        ("open", "", 0),
        ("open", "walk", 0),
    ],
)
def test_similarity_of(asked, read, expected):
    """Case, spaces and typographic forms do not count; other letters do, those too many as well."""
    assert similarity(asked, read) == pytest.approx(expected)


@given(st.sampled_from(QUOTES), LETTERS, LETTERS)
def test_quotes_of_every_kind(quotes, first, second):
    """What stands in quotes comes back, in order, without the spaces around it."""
    opening, closing = quotes
    first, second = first.strip(), second.strip()
    prompt = f"a sign with {opening}{first}{closing} above {opening}{second}{closing} at night"
    assert quoted(prompt) == [first, second]


@given(st.lists(st.sampled_from(["dog", "don't", "it's", "the", "dogs'", "o’clock", "rock’n’roll", "we'll"])))
def test_apostrophes_are_no_quotes(words):
    """A prompt with apostrophes alone quotes nothing."""
    assert quoted(" ".join(words)) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red fox in the snow", []),
        ("a door, 'don't enter' on it", ["don't enter"]),
        ("a dog's bowl that says 'it's Rex's'", ["it's Rex's"]),
        ('the dogs\' house, "REX" above', ["REX"]),
        ("‘rock’n’roll’ in neon", ["rock’n’roll"]),
        ("„Hallo“ und „Welt“", ["Hallo", "Welt"]),
        ("a poster “SALE” beside «СКИДКИ» and 「東京」", ["SALE", "СКИДКИ", "東京"]),
        ('the words "one\ntwo"', ["one\ntwo"]),
        ('a screen 5" wide', []),
        ('empty "" and blank "  "', []),
        ("a sign (“OPEN”).", ["OPEN"]),
        ("", []),
    ],
)
def test_quoted(prompt, expected):
    """Quotes inside sentences, beside apostrophes, in several alphabets; a lone mark quotes nothing."""
    assert quoted(prompt) == expected
