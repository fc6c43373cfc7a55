"""The grammar of what users write in one line: reward specs, routes and weightings.

    sum       = [sign] product { sign product }                            a reward spec
    product   = factor { "*" factor }                                      numbers, and exactly one reference
    routes    = route ["[" reference "=" route {"," reference "=" route} "]"]
    weighting = name [options]
    reference = name [":" variant] ["@" revision] [options]
    options   = "[" [key "=" value {"," key "=" value}] "]"
    value     = true | false | null | number | word | "text as in JSON" | "[" list of these "]"

The first three are read where they are used (`spec.py`, `routes.py`, `training/weighting.py`), by the pieces below. A
text is read once, from left to right, in time linear in its length: no pattern may have two ways to match the same
characters. Nothing here loads a reward, or torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from rdm_sdk.errors import RDMError, shown
from rdm_sdk.plugins.hookspecs import REWARD_NAME

Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = Scalar | tuple[Scalar, ...]

MAX_LENGTH = 20_000
"""Characters of a text; ten times what a person would write."""
EXCERPT = 60
"""How many characters before and after the place of a mistake its message quotes."""

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(rf"{REWARD_NAME}(?:\.{KEY.pattern})*", re.ASCII)
"""A registered reward, or the module of one that is named by its place: `my_package.rewards:ink`."""
PART = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]*")
"""A variant or a revision."""
WORD = re.compile(r"[A-Za-z0-9_./~:-]+")
NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
SIGNED = re.compile(rf"-?{NUMBER.pattern}")
SIGN = re.compile(r"[+-]")
KEYWORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}

_DIGITS = re.compile(r"-?[0-9]{1,4000}")  # Python reads no longer integers
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_EXPONENT = re.compile(r"\+[0-9]+")
_SPACE = re.compile(r"\s*", re.ASCII)


def show_value(value: Value) -> str:
    """Return a value as a text that reads as the same value."""
    if isinstance(value, tuple):
        return "[" + ",".join(show_value(item) for item in value) + "]"
    if isinstance(value, str) and WORD.fullmatch(value) and value not in KEYWORDS and not SIGNED.match(value):
        return value
    return json.dumps(value)


@dataclass(frozen=True)
class Reference:
    """Which reward is meant, and how it is set up."""

    name: str
    variant: str | None = None
    revision: str | None = None
    options: dict[str, Value] = field(default_factory=dict)


class Parser:
    """Reads a text from left to right; a mistake is an error of the caller's kind, with its column.

    Args:
        text: what is read.
        subject: what it is, as it stands before the text in messages: "weighting=".
        hint: what such a text looks like, a sentence.
        error: the class of the errors.

    Raises:
        RDMError: of the class `error`; what is given is no text, or far too long.
    """

    def __init__(self, text: object, subject: str, hint: str, error: type[RDMError]) -> None:
        if not isinstance(text, str):
            raise error(f"{subject}{shown(text)} is a {type(text).__name__}, not a text. {hint}.")
        self.text, self.subject, self.hint, self.error = text, subject, hint, error
        self.position = 0
        if len(text) > MAX_LENGTH:
            self.position = MAX_LENGTH
            self.fail(f"{len(text)} characters are too many; at most {MAX_LENGTH} are read")

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Raise the caller's error for a problem at the current position, or at another."""
        if at is not None:
            self.position = at
        self.skip_space()
        at = self.position
        start, end = max(at - EXCERPT, 0), at + EXCERPT
        quoted = f"{'...' if start else ''}{shown(self.text[start:end])}{'...' if end < len(self.text) else ''}"
        raise self.error(f"cannot read {self.subject}{quoted} at column {at + 1}: {problem}. {self.hint}.")

    # ---- Pieces -------------------------------------------------------------------------------------------------

    def skip_space(self) -> None:
        """Move on to the next character that is no white space."""
        found = _SPACE.match(self.text, self.position)
        self.position = found.end() if found else self.position

    def at_end(self) -> bool:
        """Return whether nothing but white space is left."""
        self.skip_space()
        return self.position == len(self.text)

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """Consume and return what a pattern matches after white space, None if it does not match."""
        self.skip_space()
        return self.take_next(pattern)

    def take_next(self, pattern: re.Pattern[str]) -> str | None:
        """Consume and return what a pattern matches at the current position, None if it does not match."""
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match[0]

    def mark(self, character: str) -> bool:
        """Consume a character after white space; return whether it was there."""
        self.skip_space()
        return self.next_mark(character)

    def next_mark(self, character: str) -> bool:
        """Consume a character at the current position; return whether it was there."""
        there = self.text.startswith(character, self.position)
        self.position += there
        return there

    # ---- What the three kinds of texts share --------------------------------------------------------------------

    def reference(self, expected: str = "a reward's name") -> Reference:
        """Read a reward's name, with its variant, revision and options."""
        name = self.take(NAME)
        if name is None:
            self.fail(f"expected {expected} here")
        parts: dict[str, str] = {}
        for mark, kind in ((":", "variant"), ("@", "revision")):
            if self.next_mark(mark):
                part = self.take_next(PART)
                if part is None:
                    self.fail(f"expected a {kind} after {mark!r}")
                parts[kind] = part
        return Reference(name, parts.get("variant"), parts.get("revision"), self.options())

    def options(self) -> dict[str, Value]:
        """Read options in brackets; none where no bracket follows at once."""
        options: dict[str, Value] = {}
        if not self.next_mark("["):
            return options
        while not self.mark("]"):
            if options and not self.mark(","):
                self.fail("expected ',' or ']' here")
            key = self.take(KEY)
            if key is None:
                self.fail("expected an option such as key=value here")
            if key in options:
                self.fail(f"the option {key[:EXCERPT]!r} is given twice")
            if not self.mark("="):
                self.fail(f"expected '=' after the option {key[:EXCERPT]!r}")
            options[key] = self._list() if self.mark("[") else self._scalar()
        return options

    def _list(self) -> tuple[Scalar, ...]:
        items: list[Scalar] = []
        while not self.mark("]"):
            if items and not self.mark(","):
                self.fail("expected ',' or ']' here")
            items.append(self._scalar())
        return tuple(items)

    def _scalar(self) -> Scalar:
        quoted = self.take(_QUOTED)
        if quoted is not None:
            try:
                return str(json.loads(quoted))
            except ValueError:
                self.fail("a quoted value is written as in JSON")
        word = self.take(WORD)
        if word is None:
            self.fail("expected a value here; put texts with other characters in double quotes")
        if word in KEYWORDS:
            return KEYWORDS[word]
        if _DIGITS.fullmatch(word):
            return int(word)
        if SIGNED.fullmatch(word):
            return float(word)
        if SIGNED.match(word):
            # "1e+16" breaks at "+"; anything else that begins like a number is a text in need of quotes.
            rest = self.take_next(_EXPONENT)
            if rest is not None and SIGNED.fullmatch(word + rest):
                return float(word + rest)
            self.fail("a text that begins with a digit needs double quotes")
        return word
