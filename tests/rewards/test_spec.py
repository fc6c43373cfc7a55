"""The grammar of reward specs: printing and parsing are inverse, and nothing but the SDK's own error ever comes out."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdm_sdk import ConfigError, RDMError, RewardError, RewardTerm, parse_spec
from rdm_sdk.rewards.grammar import MAX_LENGTH
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.rewards.routes import parse_route
from rdm_sdk.rewards.spec import label_terms, make_term, show_spec
from rdm_sdk.training.weighting import make_weighting

WORD = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,6}(-[A-Za-z][A-Za-z0-9_]{0,3})?", fullmatch=True)
PART = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_./-]{0,8}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
OPTIONS = st.dictionaries(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True),
    SCALAR | st.lists(SCALAR, max_size=3).map(tuple),
    max_size=3,
)
TERMS = st.builds(
    lambda **fields: make_term(fields),
    name=WORD | st.builds("{}/{}".format, WORD, WORD),
    variant=st.none() | PART,
    revision=st.none() | PART,
    options=OPTIONS,
    weight=st.floats(allow_nan=False, allow_infinity=False),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(TERMS, min_size=1, max_size=3))
def test_print_then_parse_is_the_identity(terms):
    """A printed term, and a printed sum of terms, parses back to equal terms, types included."""
    comes_back(terms)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(st.lists(TERMS, min_size=1, max_size=3))
def test_many_printed_terms_come_back(terms):
    """Other ones in every run."""
    comes_back(terms)


def comes_back(terms):
    """Parse what is printed, and compare."""
    assert parse_spec(show_spec(terms)) == terms
    for term in terms:
        (parsed,) = parse_spec(str(term))
        assert parsed == term
        assert repr(sorted(parsed.options.items())) == repr(sorted(term.options.items()))
        assert hash(parsed) == hash(term)


# Half the strings are made of what specs are made of, so that they get past the first character.
TOKENS = st.sampled_from(
    [*'+-*:@[]=,./ "\\\n', "dm", "0.5", "1e9", "1e999", "hps:v2", "a/b", "true", "[k=1]", '"x"', "٣", "é", "9" * 5000]
)
STRINGS = st.text(max_size=20) | st.lists(TOKENS, max_size=12).map("".join)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(STRINGS)
@example('dm[k="\\x"]')  # in quotes, and no text of JSON
def test_random_strings_raise_nothing_else(text):
    """Whatever is typed, the answer is terms or a `RewardError`."""
    is_answered(text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(STRINGS)
def test_many_random_strings_raise_nothing_else(text):
    """Other ones in every run."""
    is_answered(text)


def is_answered(text):
    """Parse a text, and look at what comes."""
    try:
        terms = parse_spec(text)
    except RewardError:
        return
    assert terms
    assert all(isinstance(term, RewardTerm) and math.isfinite(term.weight) for term in terms)


@pytest.mark.parametrize(
    "text", ["true", "null", "1", "-2.5", "1e3", ".5x", "", "a b", '"', "\\", "x+-y", "1e+16", "é"]
)
def test_texts_that_look_like_something_else(text):
    """A text stays a text, whatever it looks like."""
    term = make_term({"name": "dm", "options": {"x": text, "y": [text, True, 1, 1e16]}})
    (parsed,) = parse_spec(str(term))
    assert parsed.options == {"x": text, "y": (text, True, 1, 1e16)}
    assert [type(value) for value in parsed.options["y"]] == [str, bool, int, float]


def test_numbers_that_no_spec_can_hold():
    """Infinity, NaN and numbers longer than Python reads are refused as the SDK refuses things."""
    for value in (float("inf"), float("nan")):
        with pytest.raises(RewardError, match="option"):
            make_term({"name": "dm", "options": {"x": value}})
    with pytest.raises(RewardError, match="column"):
        parse_spec(f"dm[x={'9' * 5000}]")
    for weight in (float("inf"), float("nan")):
        with pytest.raises(RewardError, match="finite"):
            resolve_rewards([("dm", weight)])


def test_a_minus_needs_no_spaces_before_a_number():
    """A hyphen belongs to a name only before a letter."""
    assert parse_spec("dm-0.2*jpeg") == parse_spec("dm - 0.2*jpeg")
    assert parse_spec("fine-grain")[0].name == "fine-grain"


def test_the_example_of_the_docs():
    """Variants, revisions, options, products and signs end up where they belong."""
    spec = 'dm + 0.5*hps:v2.1 - 2*0.15*acme/sharpness@main[radius=3, mode="a b", sizes=[1, 2.5], fast=true, x=null]'
    dm, hps, sharpness = parse_spec(spec)
    assert (dm.name, dm.weight, dm.options) == ("dm", 1.0, {})
    assert (hps.name, hps.variant, hps.weight) == ("hps", "v2.1", 0.5)
    assert (sharpness.name, sharpness.revision, sharpness.weight) == ("acme/sharpness", "main", -0.3)
    assert sharpness.options == {"radius": 3, "mode": "a b", "sizes": (1, 2.5), "fast": True, "x": None}


@pytest.mark.parametrize(
    ("spec", "column", "words"),
    [
        ("dm + 0.5*hps:", 14, "expected a variant after ':'"),
        ("dm + hps@", 10, "expected a revision after '@'"),
        ("dm * legibility", 6, "a second reward"),
        ("2 * 3", 6, "a reward after the number"),
        ("dm[x=1, x=2]", 10, "the option 'x' is given twice"),
        ("dm[x 1]", 6, "expected '=' after the option 'x'"),
        ("dm[x=1 y=2]", 8, "expected ',' or ']'"),
        ("dm[x=1", 7, "expected ',' or ']'"),
        ("dm[=1]", 4, "expected an option"),
        ("dm[x=]", 6, "expected a value"),
        ("dm[x=1a]", 8, "needs double quotes"),
        ('dm[x="\\q"]', 10, "as in JSON"),
        ("1e999*dm", 1, "weight"),
        ("3.*.5.1*dm", 8, "'.5.1' is not a number"),
        ("dm ? clip", 4, "expected '+', '-' or '*'"),
    ],
)
def test_problems_have_a_column(spec, column, words):
    """The message shows the spec, the column and the problem."""
    with pytest.raises(RewardError) as caught:
        parse_spec(spec)
    assert f"at column {column}: " in str(caught.value)
    assert words in str(caught.value)


def test_labels_are_as_short_as_tells_apart():
    """The name, else the variant too, else everything; the same reward twice is refused."""
    terms = parse_spec("dm + hps:v2 + hps:v2.1 + clip[path=a] + clip[path=b]")
    assert label_terms(terms) == ["dm", "hps:v2", "hps:v2.1", "clip[path=a]", "clip[path=b]"]
    with pytest.raises(RewardError, match="two rewards have the name 'hps:v2'"):
        label_terms(parse_spec("hps:v2 + 0.5*hps:v2"))


def ink(images, prompts, **columns):
    """A plain function."""
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "given",
    [
        "dm + 0.5*legibility",
        ["dm", "0.5*legibility"],
        {"dm": 1, "legibility": 0.5},
        [{"dm": 1.0}, {"name": "legibility", "weight": 0.5}],
        ["dm", ("legibility", 0.5)],
        [RewardTerm(name="dm"), RewardTerm(name="legibility", weight=0.5)],
        (("dm", 1), ("0.25*legibility", 2)),
    ],
)
def test_every_form_ends_in_the_same_terms(given):
    """Spec, list, mapping, fields, pairs and terms: one validated form."""
    assert [own.term for own in resolve_rewards(given)] == parse_spec("dm + 0.5*legibility")


def test_functions_and_objects_have_terms_too():
    """A function is called by its name; an object prints its options."""
    (own,) = resolve_rewards((ink, 0.2))
    assert str(own.term) == "0.2*ink"
    assert own.label == "ink"
    first, second = resolve_rewards(["dm", lambda images, prompts: [0.0]])
    assert str(second.term) == "CallableReward"
    assert first.term == parse_spec("dm")[0]


@pytest.mark.parametrize("weight", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=lambda w: type(w).__name__)
def test_a_weight_is_any_real_number(weight):
    """Of NumPy, too, where weights are computed."""
    (found,) = resolve_rewards([("dm", weight)])
    assert found.weight == 0.5
    assert type(found.weight) is float


def test_a_truth_value_is_no_number():
    """pydantic would take true for 1: `flow[last_steps=true]` is a mistake, not one step."""
    with pytest.raises(RewardError, match="'flow', option last_steps: it cannot be true or false; got True"):
        resolve_rewards("dm + flow[last_steps=true]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "dm", "wieght": 1}, r"'dm' has no option 'wieght'. Did you mean 'weight'\?"),
        ({"dm": "much"}, "reward weights must be finite numbers; got 'much'"),
        ({"dm": True}, "finite numbers; got True"),
        ({"dm + legibility": 1.0}, "exactly one reward; 'dm . legibility' names 2"),
        ({"name": "d m"}, "characters that a spec has no place for; got 'd m'"),
        ({"name": "dm", "options": {"a-b": 1}}, "'a-b' is not a name that an option can have"),
        ({"name": "dm", "options": {"a": {"b": 1}}}, "option 'a' is {'b': 1}, and a spec, .* has no form for it"),
        ({"name": "dm", "options": {"a": [1, [2]]}}, "options are finite numbers, .* and lists of these"),
        ({"name": "dm", "weight": float("nan")}, "finite number"),
        ("dm[radius=3]", "reward 'dm' has no option 'radius'. It takes none."),
        ("dm:v2", "reward 'dm' has no option 'variant'"),
    ],
)
def test_unusable_forms_are_refused(given, words):
    """Each mistake names itself, with the nearest match where there is one."""
    with pytest.raises(RewardError, match=words):
        resolve_rewards(given)


# ---- Hostile texts --------------------------------------------------------------------------------------------------

HOSTILE = {
    "letters": "a",
    "digits": "1",
    "points": "1.",
    "spaces": " ",
    "hyphens": "a-",
    "slashes": "a/",
    "brackets": "[",
    "opened": "a[",
    "quotes": '"',
    "escapes": '\\"',
    "commas": "a,",
    "pairs": "a=gradient,",
    "sums": "a+",
    "products": "2*",
    "emptiness": "\0",
}
BEGINNINGS = ["", "dm[x=", 'dm[x="', "dm + ", "gradient[", "gradient[a[x=", "balance[", "balance[decay="]
READERS = {"reward": parse_spec, "route": parse_route, "weighting": make_weighting}


@pytest.mark.parametrize("length", [MAX_LENGTH, 1_000_000])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_texts_are_refused_at_once(reader: str, kind: str, length: int) -> None:
    """In less than a second, whatever they are made of, quoting little of them; as long as is read, and far longer."""
    for beginning in BEGINNINGS:
        text = (beginning + HOSTILE[kind] * length)[: length - 1] + "?"
        started = time.process_time()
        with pytest.raises(RDMError) as caught:
            READERS[reader](text)
        assert time.process_time() - started < 1
        assert isinstance(caught.value, RewardError if reader == "reward" else ConfigError)
        assert "column" in str(caught.value)
        assert len(str(caught.value)) < 500


def test_reading_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times the text takes about sixteen times as long, not 256 times."""
    monkeypatch.setattr("rdm_sdk.rewards.grammar.MAX_LENGTH", 10_000_000)

    def seconds(reader: str, text: str) -> float:
        started = time.process_time()
        with pytest.raises(RDMError):
            READERS[reader](text)
        return time.process_time() - started

    for reader, beginning in (("reward", "dm[x="), ("route", "gradient["), ("weighting", "balance[decay=")):
        for part in HOSTILE.values():
            short, long = (beginning + part * (size // len(part)) + "?" for size in (4_000, 64_000))
            assert seconds(reader, long) < max(64 * min(seconds(reader, short) for _ in range(3)), 0.05)


@pytest.mark.parametrize("reader", READERS)
def test_only_texts_are_read(reader: str) -> None:
    """Another type is named."""
    with pytest.raises(RDMError, match="5 is a int, not a text"):
        READERS[reader](5)  # type: ignore[arg-type]
