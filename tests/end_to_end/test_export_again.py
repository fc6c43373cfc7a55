"""An export over another kind of student: the old weights go, since they would be loaded, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, load_student, save_student

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SD, SD3, PIXART = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "PixArtSigmaPipeline"


def export(folder: Path, kind: str, weights: str) -> None:
    """Save a student that was never trained."""
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    family.add_roles({STUDENT: LoraConfig(r=2) if weights == "lora" else None})
    save_student(folder, family, StudentInfo(4, None, False, 1.0, resolve_rewards("dm"), {}))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((SD3, "lora"), (SD3, "full")),
        ((SD3, "full"), (SD3, "lora")),
        ((SD, "full"), (SD3, "full")),
        ((SD3, "lora"), (PIXART, "lora")),
        ((SD3, "lora"), (SD3, "lora")),
        ((SD3, "full"), (SD3, "full")),
    ],
)
def test_the_folder_is_as_if_there_had_been_no_other(
    tmp_path: Path, first: tuple[str, str], second: tuple[str, str]
) -> None:
    export(tmp_path / "both", *first)
    export(tmp_path / "both", *second)
    export(tmp_path / "one", *second)
    assert names_in(tmp_path / "both") == names_in(tmp_path / "one")
    load_student(TINY_PIPELINES[second[0]](), tmp_path / "both")


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    """A student is written in a folder of its owner's alone first; no file of it is a program."""
    export(tmp_path / "all", PIXART, "lora")
    (tmp_path / "group").mkdir(mode=0o750)
    export(tmp_path / "group", PIXART, "lora")
    for folder in (tmp_path / "all", tmp_path / "group"):
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert modes == {folder.stat().st_mode & 0o666}


def test_plain_diffusers_finds_no_lora_beside_a_full_copy(tmp_path: Path) -> None:
    """It looks for no `base.json`: it would take the old weights for the student."""
    export(tmp_path, SD3, "lora")
    export(tmp_path, SD3, "full")
    pipeline: Any = TINY_PIPELINES[SD3]()
    with pytest.raises(OSError, match="no file named pytorch_lora_weights"):
        pipeline.load_lora_weights(str(tmp_path))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_no_export_writes_stays(tmp_path: Path, weights: str) -> None:
    """Anywhere in the folder; shards of a large copy are an export's, weights in another precision are not."""
    export(tmp_path, SD3, weights)
    own = ["notes.txt", "peft/notes.txt", "transformer/notes.txt", "unet/config.json", "style.safetensors"]
    own.append("transformer/diffusion_pytorch_model.fp16.safetensors")
    shards = [f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    shards.append("transformer/diffusion_pytorch_model.safetensors.index.json")
    for name in [*own, *shards]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    export(tmp_path, SD3, "full" if weights == "lora" else "lora")
    left = names_in(tmp_path)
    assert left >= set(own)
    assert left.isdisjoint(shards) == (weights == "full")


@pytest.mark.parametrize("before", [None, "full"])
def test_the_weights_of_a_whole_pipeline_stay(tmp_path: Path, before: str | None) -> None:
    """Of a base whose folder is exported into, and of a pipeline that was saved into a student's."""
    if before is not None:
        export(tmp_path, SD3, before)
    TINY_PIPELINES[SD3]().save_pretrained(tmp_path)
    export(tmp_path, SD3, "lora")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("content", [None, "{"])
def test_without_a_base_that_can_be_read_nothing_is_removed(tmp_path: Path, content: str | None) -> None:
    """The weights might be anybody's."""
    export(tmp_path, SD3, "full")
    (tmp_path / "base.json").unlink()
    if content is not None:
        (tmp_path / "base.json").write_text(content)
    export(tmp_path, SD3, "lora")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    load_student(TINY_PIPELINES[SD3](), tmp_path)
