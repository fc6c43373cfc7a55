"""Whatever has happened to a student's folder: it loads, or an error of this package says what is wrong with it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusion3Pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdm_sdk import ModelError, RDMError, RDMTrainer, digits
from rdm_sdk.training.export import load_student

FILES = [
    "base.json",
    "inference.json",
    "scheduler/scheduler_config.json",
    "pytorch_lora_weights.safetensors",
    "peft/adapter_config.json",
]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@pytest.fixture(scope="session")
def make_trainer(make_digits_trainer: Callable[..., RDMTrainer]) -> Callable[..., RDMTrainer]:
    """Return the maker of runs on the embedded teacher, whose pictures are looked at here."""
    return make_digits_trainer


@pytest.fixture(scope="module")
def student(make_trainer: Callable[..., RDMTrainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder."""
    folder = tmp_path_factory.mktemp("students")
    trainer = make_trainer(folder / "run")
    trainer.save_model(str(folder / "whole"))
    return folder / "whole"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The base, as it is loaded."""
    return StableDiffusion3Pipeline.from_pretrained(digits.teacher_path())


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """What may happen to one file of a student's."""
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["flip", "cut", "bytes", "field", "field", "field", "gone"]))
    place, bit, value = draw(st.floats(0, 0.999)), draw(st.integers(0, 7)), draw(JSON)

    def damage(folder: Path) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        if kind == "gone":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[: int(place * len(content))])
        elif kind == "bytes":
            path.write_bytes(json.dumps(value).encode())
        elif kind == "field" and name.endswith(".json"):
            fields = json.loads(content)
            fields[sorted(fields)[int(place * len(fields))]] = value
            path.write_text(json.dumps(fields))
        else:
            content[int(place * min(len(content), 3000))] ^= 1 << bit  # in a file of weights: its header
            path.write_bytes(content)

    return damage


def try_to_load(damage: Callable[[Path], None], student: Path, pipeline: Any, folder: Path) -> None:
    """Load a damaged copy of a student; anything but an error of the package, or none, fails the test."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(student, folder)
    damage(folder)
    base = copy.copy(pipeline)
    base.register_modules(transformer=copy.deepcopy(pipeline.transformer))
    try:
        call = load_student(base, folder)
    except RDMError:
        return
    assert call["num_inference_steps"] >= 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(damage=damages())
def test_a_damaged_folder_is_loaded_or_refused(
    damage: Callable[[Path], None], student: Path, pipeline: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bits, lengths, fields and files."""
    try_to_load(damage, student, pipeline, tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(damage=damages())
def test_many_damaged_folders(
    damage: Callable[[Path], None], student: Path, pipeline: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same with other examples every time."""
    try_to_load(damage, student, pipeline, tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("base.json", '{"pipeline": 3}', "base.json in .* is damaged: pipeline: Input should be a valid string"),
        ("base.json", "[", "base.json in .* is damaged: Expecting value"),
        ("inference.json", "{}", "inference.json in .* is damaged: num_inference_steps is None"),
        ("scheduler/scheduler_config.json", '{"_class_name": "os"}', "names no scheduler of diffusers .*: 'os'"),
    ],
)
def test_the_damaged_file_is_named(
    name: str, content: str, words: str, student: Path, pipeline: Any, tmp_path: Path
) -> None:
    """With what is wrong with it, and before the pipeline is changed."""
    shutil.copytree(student, tmp_path / "student")
    (tmp_path / "student" / name).write_text(content)
    with pytest.raises(ModelError, match=words):
        load_student(pipeline, tmp_path / "student")
    assert not getattr(pipeline.transformer, "peft_config", None)
