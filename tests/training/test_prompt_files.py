"""Prompts from files: every format gives the same rows, and nothing is read as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.errors import DataError, RDMError
from rdm_sdk.training.data import load_prompts

ROWS = [
    {"prompt": "a cat, sitting", "text": "NA", "digit": 7, "weight": 0.5},
    {"prompt": 'say "hi"', "text": None, "digit": None, "weight": 1.0},
    {"prompt": "7", "text": "two\nlines", "digit": 2, "weight": 2.5},
]


def written(folder: Path, suffix: str) -> Path:
    """Write the rows in a format; return the file."""
    path = folder / f"prompts{suffix}"
    rows = Dataset.from_list(ROWS)
    match suffix:
        case ".csv":
            rows.to_csv(str(path), index=False)
        case ".tsv":
            rows.to_csv(str(path), index=False, sep="\t")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".jsonl":
            lines = [{name: value for name, value in row.items() if value is not None} for row in reversed(ROWS)]
            path.write_text("\n".join(map(json.dumps, reversed(lines))), encoding="utf-8")
        case ".parquet":
            rows.to_parquet(str(path))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_table_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    """Columns included, so that rewards can read them; words that some readers take for nothing stay words."""
    assert load_prompts(written(tmp_path, suffix)).to_list() == ROWS


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["7", "-2", ""], [7, -2, None]),
        (["0.5", "1", ""], [0.5, 1.0, None]),
        (["007", "42"], ["007", "42"]),
        (["1.50", "2"], ["1.50", "2"]),
        (["12:30", "9:15"], ["12:30", "9:15"]),
        (["2024-01-02", "2024-01-03"], ["2024-01-02", "2024-01-03"]),
        (["true", "false"], ["true", "false"]),
        (["nan", "inf"], ["nan", "inf"]),
        (["1_000", "1e5"], ["1_000", "1e5"]),
        (["9" * 40, "1"], ["9" * 40, "1"]),
    ],
    ids=str,
)
def test_a_column_of_a_table_loses_nothing(cells: list[str], read: list[Any], tmp_path: Path) -> None:
    """Numbers are numbers where they are written as such; what would come back otherwise stays a text."""
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,x\n" + "".join(f"a,{cell}\n" for cell in cells), encoding="utf-8")
    found = load_prompts(path)["x"][:]
    assert found == read
    assert list(map(type, found)) == list(map(type, read))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """Python's own reader of CSV, which looks at the quotes, stops at 131,072 letters."""
    path = tmp_path / "prompts.csv"
    path.write_text(f'prompt,x\na,"{"b" * 200_000}"\n', encoding="utf-8")
    assert len(load_prompts(path)["x"][0]) == 200_000


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(suffix: str, tmp_path: Path) -> None:
    """Windows' editors write one."""
    content = {".csv": "prompt\nÜ\n", ".json": '[{"prompt": "Ü"}]', ".jsonl": '{"prompt": "Ü"}', ".txt": "Ü\r\n"}
    path = tmp_path / f"prompts{suffix}"
    path.write_text(content[suffix], encoding="utf-8-sig")
    assert load_prompts(path)["prompt"][:] == ["Ü"]


def test_a_text_ends_its_lines_where_editors_do(tmp_path: Path) -> None:
    """Python's `splitlines` breaks at form feeds and at U+2028 as well, which would make two prompts of one."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\u2028and\x0bmore\r\n\n two \x0c".encode())
    assert load_prompts(path)["prompt"][:] == ["one\u2028and\x0bmore", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", b"prompt\na cat, sitting\n", r"p.csv' cannot be read as csv: .*line 2: expected 1 cells, got 2"),
        ("p.csv", b"prompt,prompt\na,b\n", "the column 'prompt' is there more than once"),
        ("p.csv", b"promt\na\n", "no column 'prompt'.*Did you mean 'promt'"),
        ("p.csv", b"prompt;text\na;b\n", r"no column 'prompt' \(it has: prompt;text\)"),
        ("p.csv", b"prompt,text\n,b\n", "prompt 0 must be a text that is not empty; got None"),
        ("p.csv", b"", "p.csv' cannot be read as csv"),
        ("p.csv", b"prompt\n\xff\xfe\n", "p.csv' is no text in UTF-8"),
        ("p.csv", b"prompt,images\na,b\n", "a column 'images', which is what rewards are given; rename"),
        ("p.csv", b'prompt\na fox\n"a cat\na dog\n', "csv: the row that begins in line 3: .*must end with one"),
        ("p.csv", b'prompt\n"a\ncat"\n"Untitled" by K\n', "csv: the row that begins in line 4: .*quotes in it are"),
        ("p.tsv", b'prompt\tx\n"a" b\t1\n', "tsv: the row that begins in line 2: "),
        ("p.json", b'{"prompt": ["a"]}', "must hold a list of objects; got dict"),
        ("p.json", b'["a", "b"]', """row 0 must be an object such as {"prompt": "a cat"}; got 'a'"""),
        ("p.json", b'[{"prompt": "a"}', "p.json' cannot be read as json"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 7}\n', "prompt 1 must be a text|cannot be read as jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\nb\n', "p.jsonl' cannot be read as jsonl"),
        ("p.jsonl", b'{"prompt": "a", "id": 18446744073709551616}\n', "p.jsonl' cannot be read as jsonl: .* too large"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl' cannot be read as jsonl"),
        ("p.jsonl", b"", "no prompts"),
        ("p.parquet", b"prompt\na\n", "p.parquet' cannot be read as parquet"),
        ("p.txt", b"\x89PNG\r\n", "p.txt' is no text in UTF-8"),
        ("p.txt", b"a\0b\n", "zero byte"),
        ("p.txt", "a".encode("utf-16"), "p.txt' is no text in UTF-8"),
        ("p.xlsx", b"PK", "files like 'p.xlsx' are not read; there are .txt, .csv, .tsv, .json, .jsonl, .parquet"),
        ("p.yaml", b"- a\n", "files like 'p.yaml' are not read"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    """In a line that names the file and what is wrong with it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_prompts(tmp_path / name)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    suffix=st.sampled_from([".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(str.encode),
        st.text("promt,\"'\n\t{}[]: 1", max_size=60).map(lambda text: ("prompt,x\n" + text).encode()),
        st.text('{}[]:," \nprompt1', max_size=40).map(str.encode),
    ),
)
def test_any_bytes_are_prompts_or_an_error_of_this_package(
    suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in a file."""
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        rows = load_prompts(path)
    except RDMError:
        return
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in rows["prompt"])
