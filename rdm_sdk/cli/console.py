"""What the commands share: a parser that refuses in one line, checks of single values, tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rdm_sdk.errors import ConfigError


class _Help(argparse.HelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        if default is None or default is False or default in ([], argparse.SUPPRESS) or "%(default)" in text:
            return text
        return f"{text} (%(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and exit; shows defaults; takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | options)
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


def check_file(option: str, path: Path, kind: str) -> None:
    """Raise `ConfigError` if a file, of a kind such as "picture", cannot be written to `path`, a folder being there."""
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; give the name of a {kind}")
    check_folder(option, path.parent)


def add_place(parser: Parser, dtype: bool = True) -> None:
    """Add `--device`, which `find_device` reads, and `--dtype`."""
    if dtype:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; a GPU if there is one")


def find_device(named: str | None) -> Any:
    """Return the torch device of `--device`: by default a GPU if there is one.

    Raises:
        ConfigError: there is no such device, or not here.
    """
    import torch

    try:
        device = torch.device(named or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device: {named!r} is no device; give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: there is no {named}; this machine has {torch.cuda.device_count()} GPUs")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # as each kind of device has it
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch then lists all that it knows
        raise ConfigError(f"--device: {named!r} cannot be used here: {reason}") from error
    return device


def one_line(error: BaseException) -> str:
    """Return an exception's message and its notes on one line."""
    parts = [str(error).strip() or type(error).__name__, *getattr(error, "__notes__", [])]
    return " ".join(" ".join(parts).split())


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
