"""Soft-TIFA (GenEval 2, arXiv 2512.16853): a prompt's atoms as questions with answers, and what a judge's count for.

The form of the questions, of the answers and the means are those of the README and the evaluation of
facebookresearch/GenEval2.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor

from rdm_sdk import RewardError

COLUMN = "vqa_list"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Atom(NamedTuple):
    """A question about one atom of a prompt, and the right answer to it."""

    question: str
    answer: str


def parse(entry: object) -> list[Atom]:
    """Return the atoms that an entry of the column `vqa_list` holds; None holds none.

    Args:
        entry: a list of pairs of texts, question and right answer, as in GenEval 2's data, or that as JSON text.

    Raises:
        RewardError: it is no such list; says which part.
    """
    given: Any = entry
    if isinstance(entry, str):
        try:
            given = json.loads(entry)
        except ValueError as error:
            raise RewardError(f"geneval2: the column {COLUMN!r} holds {entry!r}, which is no JSON: {error}") from error
    if given is None:
        return []
    pairs = given if isinstance(given, (list, tuple)) else [given]
    for pair in pairs:
        if not (
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise RewardError(
                f"geneval2: an entry of the column {COLUMN!r} must be a list of pairs, question and right answer, such "
                f'as [["How many dogs are in the image?", "two"]], or that as JSON text; got {pair!r} in {entry!r}'
            )
    return [Atom(question.strip(), answer.strip()) for question, answer in pairs]


def asked(atom: Atom) -> str:
    """Return what a judge is asked about an atom."""
    return f"{atom.question} Answer in one word."


def spellings(answer: str) -> tuple[str, ...]:
    """Return the forms in which a model may begin an answer: small, capitalized, after a space; a count as a digit.

    "Yes" gives those of "yes", "four" (or "4") those of "four" and of "4".
    """
    forms = [answer, answer.lower(), answer.capitalize()]
    number = _WORDS.index(answer.lower()) if answer.lower() in _WORDS else -1
    if number < 0 and answer.isascii() and answer.isdecimal() and int(answer) < len(_WORDS):
        number = int(answer)
    if number >= 0:
        forms += [_WORDS[number], _WORDS[number].capitalize(), str(number)]
    return tuple(dict.fromkeys(f"{space}{form}" for form in forms for space in ("", " ")))


def soft_tifa(logarithms: Tensor, mean: str) -> Tensor:
    """Return Soft-TIFA, in [0, 1], of the log probabilities `[atoms]` of the right answers.

    "gm" is the geometric mean, of which a prompt is judged; "am" the arithmetic one, of which atoms are.
    """
    return logarithms.mean().exp() if mean == "gm" else logarithms.exp().mean()
