"""Prompts from files: plain text, and tables (CSV, TSV, JSON, JSON lines, Parquet) with further columns for rewards."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow
from datasets import Dataset
from pyarrow.parquet import ParquetFile

from rdm_sdk.errors import DataError, shown

LIMIT = 2**63
"""Whole numbers of 64 bits are smaller."""


def read_prompt_file(path: Path, argument: str) -> Dataset:
    """Return a file's prompts as a `Dataset`, by its suffix; tables keep all their columns.

    - `.txt` (or none): one prompt per line, blank lines skipped.
    - `.csv`, `.tsv`: a header with a column `prompt`; empty cells are None. A further column holds numbers if each of
      its cells is one as Python writes it ("7", "0.5"); "007", "1.50", dates and "true" are texts.
    - `.json`: a list of objects; `.jsonl`: one object per line; what an object lacks is None.
    - `.parquet`: as it is.

    Texts are UTF-8, with or without a byte order mark.

    Raises:
        DataError: no such file, another suffix, or a content that is not of its suffix's format.
    """
    if not path.is_file():
        raise DataError(
            f"{argument}: there is no file at {str(path)!r}; write one prompt per line, or a table with a column "
            "'prompt'"
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{argument}: files like {path.name!r} are not read; there are {', '.join(filter(None, _READERS))}"
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{argument}: {str(path)!r} is no text in UTF-8: {error}") from error
    except (ValueError, OverflowError, pyarrow.ArrowException, RecursionError) as error:
        raise DataError(f"{argument}: {str(path)!r} cannot be read as {path.suffix[1:]}: {error}") from error


def _lines(path: Path) -> list[str]:
    """Return the lines of a text; what only some call the end of a line, such as U+2028, is part of one."""
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise DataError(f"{str(path)!r} is no text: it holds a zero byte")
    return [line for line in map(str.strip, text.split("\n")) if line]


def _read_text(path: Path) -> Dataset:
    return Dataset.from_dict({"prompt": _lines(path)})


def _read_table(path: Path) -> Dataset:
    rows = _rows(path.read_bytes().decode("utf-8-sig"), "\t" if path.suffix.lower() == ".tsv" else ",")
    twice = [name for name, count in Counter(rows[0]).items() if count > 1]
    if twice:
        raise ValueError(f"the column {twice[0]!r} is there more than once")
    # "NA" and "null" are words, and only an empty cell is none.
    columns = {name: [cell or None for cell in cells] for name, *cells in zip(*rows, strict=True)}
    return Dataset.from_dict({n: cells if n == "prompt" else _numbers_or_texts(cells) for n, cells in columns.items()})


def _rows(text: str, delimiter: str) -> list[list[str]]:
    """Return the rows of a table, each with as many cells as the first, which names the columns.

    Raises:
        ValueError: there is none, one has another number of cells, or quotes do not close, or text follows them.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    start = 1
    limit = csv.field_size_limit(max(len(text), 1))  # the module's own would refuse cells of 131,073 letters and more
    try:
        for row in filter(None, reader):  # without empty lines
            rows.append(row)
            if len(row) != len(rows[0]):
                raise ValueError(f"the row of line {reader.line_num}: expected {len(rows[0])} cells, got {len(row)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"the row that begins in line {start}: {error}. A cell that begins with a quote must end with one, and "
            'quotes in it are doubled: "say ""hi"""'
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError("it is empty; its first line must name the columns")
    return rows


def _numbers_or_texts(cells: list[str | None]) -> Sequence[float | str | None]:
    """Return a column as numbers if each of its cells is one, whole ones if all are, and else as the texts it holds.

    "007" and "true" are words to a reward.
    """
    numbers = [None if cell is None else _number(cell) for cell in cells]
    if any(number is None for number, cell in zip(numbers, cells, strict=True) if cell is not None):
        return cells
    if all(isinstance(number, int) for number in numbers if number is not None):
        return numbers
    return [None if number is None else float(number) for number in numbers]


def _number(cell: str) -> int | float | None:
    """Return the number that is written as a cell is, None if there is none."""
    for kind in (int, float):
        try:
            number = kind(cell)
        except ValueError:
            continue
        if str(number) == cell and abs(number) < LIMIT:
            return number
    return None


def _read_json(path: Path) -> Dataset:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list):
        raise ValueError(f"it must hold a list of objects; got {type(content).__name__}")
    return _from_objects(content)


def _read_json_lines(path: Path) -> Dataset:
    return _from_objects(map(json.loads, _lines(path)))


def _from_objects(rows: Iterable[object]) -> Dataset:
    found: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f'row {number} must be an object such as {{"prompt": "a cat"}}; got {shown(row, 60)}')
        found.append(row)
    names = dict.fromkeys(name for row in found for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in found] for name in names})


def _read_parquet(path: Path) -> Dataset:
    try:
        with ParquetFile(path) as file:
            return Dataset(file.read())
    except Exception as error:  # whatever Arrow raises of what is no table, or a damaged one
        raise ValueError(str(error)) from error


_READERS: dict[str, Callable[[Path], Dataset]] = {
    "": _read_text,
    ".txt": _read_text,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
