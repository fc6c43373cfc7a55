"""What the commands share: a parser that refuses in one line, checks of single values, tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rdm_sdk.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and exit; takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.allow_abbrev = False

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type for `add_argument`: whole numbers from `least` to `most`, both included."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            limit = "" if most is None else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}{limit}; got {text!r}")
        return number

    return parse


PROMPTS_MISSING = "--prompts is missing: give a file, with a prompt per line or a column 'prompt'"
SEED = whole_number(0, 2**32 - 1)
"""What all libraries take as a seed."""


def check_folder(option: str, path: Path) -> None:
    """Raise `ConfigError` if `path` is there and is no folder, or if something above it is a file."""
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ConfigError(f"{option}: {path} cannot be a folder, because {place} is a file")
            return


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
