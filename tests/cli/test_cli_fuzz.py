"""Whatever stands in a YAML file: settings, or an error of this package in one line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdm_sdk.cli.run_arguments import RunArguments, parse_run
from rdm_sdk.errors import RDMError
from rdm_sdk.training.config import RDMConfig

NAMES = sorted({*RDMConfig.__dataclass_fields__, *RunArguments.__dataclass_fields__, "env", "learning_rat"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-4", "auto", "no", "steps", "32x32", "cpu", "dm", "balance[x=1]", "{", "true"]),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=4), SCALARS, max_size=2), st.dates()
)
MAPPINGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4).map(
    lambda content: yaml.safe_dump({"model": "digits"} | content, allow_unicode=True)
)
TEXTS = st.one_of(st.text(max_size=60), st.text("&*!|>%@`{}[]:,- \n#'\"a1", max_size=60), st.binary(max_size=40))


def check(content: str | bytes, path: Path) -> None:
    """Read a file with this content as `train --config` does; anything but an error of the package fails the test."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    before = dict(os.environ)
    try:
        with suppress(RDMError):  # the answer that is allowed beside settings; any other exception fails the test
            parse_run("train", "", ["--config", str(path), "--output_dir", str(path.parent / "run"), "--use_cpu"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not (path.parent / "run").exists()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(content=st.one_of(MAPPINGS, MAPPINGS, TEXTS))
@example(content="model: digits\nparallelism_config: false\n")  # its class raised a TypeError
@example(content="model: digits\nenv: {'=': x}\n")  # the system raised a ValueError
@example(content="model: digits\nenv: {'': x}\n")  # and an OSError
def test_any_yaml_is_settings_or_an_error_of_this_package(
    content: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names, values of every type, and texts that are no YAML at all."""
    check(content, tmp_path_factory.getbasetemp() / "fuzz.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=3000, deadline=None)
@given(content=st.one_of(MAPPINGS, MAPPINGS, TEXTS))
def test_many_yaml_files(content: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same with other examples every time."""
    check(content, tmp_path_factory.getbasetemp() / "many.yaml")
