"""Which text a prompt asks for, and how far what was read is from it."""

from __future__ import annotations

import re
import unicodedata

# ruff: noqa: RUF001 - typographic quotes are what this file is about

_PAIRS = (
    ('"', '"'), ("“", "”"), ("„", "“"), ("„", "”"), ("«", "»"), ("‹", "›"), ("「", "」"), ("『", "』")
)  # fmt: skip
"""Opening and closing marks that are nothing but quotes."""
_SINGLE = (("'", "'"), ("‘", "’"), ("‚", "‘"))
"""Marks that are apostrophes too: one opens after no letter and closes before none, so that "don't" quotes nothing."""
_PATTERNS = [f"{a}([^{a}{b}]*){b}" for a, b in _PAIRS]
_PATTERNS += [rf"(?<!\w){a}(?=\S)((?:(?!{b}(?!\w)).)+){b}(?!\w)" for a, b in _SINGLE]
_QUOTED = re.compile("|".join(_PATTERNS), re.DOTALL)
_PLAIN = str.maketrans("‘’‚‛“”„‟‐‑‒–—―", "''''\"\"\"\"------")


def quoted(prompt: str) -> list[str]:
    """Return what stands in quotes in a prompt, in order: "...", '...', “...”, ‘...’, «...», „...“, 「...」, ..."""
    found = (match[match.lastindex or 0].strip() for match in _QUOTED.finditer(prompt))
    return [text for text in found if text]


def folded(text: str) -> str:
    """Return a text without what does not count: case, spaces, and typographic forms of quotes, dashes and letters."""
    plain = unicodedata.normalize("NFKC", text.translate(_PLAIN)).casefold()
    return "".join(unicodedata.normalize("NFKC", plain).split())


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def similarity(asked: str, read: str) -> float:
    """Return 1 minus the edit distance of two texts, folded, over the length of the longer one: in [0, 1]."""
    asked, read = folded(asked), folded(read)
    longest = max(len(asked), len(read))
    return 1 - edit_distance(asked, read) / longest if longest else 1.0
