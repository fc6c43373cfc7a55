"""Names of folders that are shown beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path


def short_names(folders: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """Return a name for each folder: its own, with as many of those above it as tell it from the others.

    Args:
        folders: different ones, as they were given; a link is called by its own name.
        taken: what none may be called.
    """
    ends = [_ends(folder) for folder in folders]
    found = Counter(end for mine in ends for end in mine)
    return [next((end for end in mine if found[end] == 1 and end not in taken), mine[-1]) for mine in ends]


def _ends(folder: Path) -> list[str]:
    """Return the ends of a path, from the folder's own name to the whole."""
    whole = folder.resolve() if ".." in folder.parts else folder.absolute()
    return [Path(*whole.parts[start:]).as_posix() for start in reversed(range(len(whole.parts)))]
