"""What an export says of itself is so: sizes, steps, seeds, and code that is Python whatever the base is called."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from pipeline_calls import run_pipeline
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, model_card, save_student

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CAUTION = "Call `torch.manual_seed(...)` before the pipeline"


def student_of(pipeline: Any) -> ModelFamily:
    family = load_family(pipeline, torch.float32)
    family.add_roles({STUDENT: LoraConfig(r=2)})
    return family


def info(stochastic: bool = True, **more: Any) -> StudentInfo:
    return StudentInfo(4, None, stochastic, 1.0, resolve_rewards("dm"), {}, **more)


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return student_of(TINY_PIPELINES["StableDiffusion3Pipeline"]())


# ---- Sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_sizes", "size", "words"),
    [
        ({"resolutions": ["16x24", "32x32"]}, (16, 24), "16 x 24, 32 x 32"),
        ({"height": 16}, (16, 32), "16 x 32"),
        ({}, (32, 32), "32 x 32"),
    ],
)
def test_the_size_of_the_run_is_that_of_the_call(
    make_trainer: Callable[..., RDMTrainer],
    tmp_path: Path,
    given_sizes: dict[str, Any],
    size: tuple[int, int],
    words: str,
) -> None:
    """The first resolution in call and card, and all of them named."""
    trainer = make_trainer(tmp_path / "run", **given_sizes)
    trainer.save_model(str(tmp_path / "student"))
    call = json.loads((tmp_path / "student" / "inference.json").read_text())
    card = (tmp_path / "student" / "README.md").read_text()
    assert (call["height"], call["width"]) == size
    assert f"height={size[0]}, width={size[1]})" in card
    assert f"- Trained at height x width: {words}\n" in card


# ---- Names ------------------------------------------------------------------------------------------------------


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def base_in(code: str) -> str:
    """Return what the card's code loads."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loads = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "from_pretrained"]
    return ast.literal_eval(next(c.args[0] for c in loads if isinstance(c.args[0], ast.Constant)))


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=40))
def test_the_cards_code_can_be_read_whatever_the_base_is_called(family: ModelFamily, name: str) -> None:
    """It names that very base."""
    family.pipeline.register_to_config(_name_or_path=name)
    assert base_in(code_of(model_card(family, info()))) == name


@pytest.mark.parametrize(
    "name", [r"C:\Users\new\base", 'a "quoted" one', "it's", "```\nprint(1)\n```", "\\", "line\nbreak", "日本/モデル😀"]
)
def test_names_that_were_no_python(family: ModelFamily, name: str) -> None:
    """Paths of Windows, quotes, and what would end the block."""
    family.pipeline.register_to_config(_name_or_path=name)
    card = model_card(family, info())
    assert base_in(code_of(card)) == name
    _, _, text = card.partition("\n# A 4-step student of ")
    assert text.count("```") == 2


def test_a_base_without_a_name_is_given_none() -> None:
    """A class's name would be taken for a hub id."""
    card = model_card(student_of(TINY_PIPELINES["StableDiffusion3Pipeline"]()), info())
    assert "base_model:" not in card
    assert "# A 4-step student of a StableDiffusion3Pipeline (a pipeline in memory)\n" in card
    assert "was a pipeline in memory: save it with save_pretrained(), and load that.\n" in code_of(card)
    assert base_in(code_of(card)) == "path/to/the/base"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", sorted(set(TINY_PIPELINES) - {"PixArtSigmaPipeline"}))  # which cannot fuse any
def test_a_base_that_loras_were_fused_into_is_not_the_one_of_its_name(kind: str, fused: bool) -> None:
    """With them taken out again, it is."""
    pipeline = TINY_PIPELINES[kind]()
    pipeline.register_to_config(_name_or_path="some/base")
    component = "unet" if "unet" in pipeline.components else "transformer"
    getattr(pipeline, component).add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.fuse_lora()
    if not fused:
        pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    card = model_card(student_of(pipeline), info())
    assert ("base_model: some/base\n" in card) != fused
    assert ("# The base, `some/base` with LoRAs fused into it, was a pipeline in memory: save it" in card) == fused
    assert base_in(code_of(card)) == ("path/to/the/base" if fused else "some/base")


def test_a_merged_base_is_named_by_the_folder_that_it_was_saved_to(tmp_path: Path) -> None:
    """As docs/models.md says: the card's code then loads the merged one."""
    pipeline = TINY_PIPELINES["StableDiffusion3Pipeline"]()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "merged")
    family = load_family(str(tmp_path / "merged"), torch.float32)
    family.add_roles({STUDENT: LoraConfig(r=2)})
    assert base_in(code_of(model_card(family, info()))) == str(tmp_path / "merged")


# ---- Steps and seeds --------------------------------------------------------------------------------------------


def test_the_card_says_that_the_number_of_steps_is_the_students(family: ModelFamily) -> None:
    assert "- `num_inference_steps` must be 4: " in model_card(family, info())


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
def test_the_card_says_whether_generator_repeats_a_picture(kind: str, stochastic: bool) -> None:
    """Two calls with one generator's seed give one picture wherever the card does not say otherwise."""
    family = student_of(TINY_PIPELINES[kind]())
    pipeline = family.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = family.student_scheduler(4, None, stochastic)
    unit = -(-32 // family.size_unit) * family.size_unit
    call = family.inference_call(4) | {"height": unit, "width": unit, "output_type": "pt"}

    def image(global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return run_pipeline(pipeline, ["a fox"], generator=torch.Generator().manual_seed(1), **call)

    assert torch.equal(image(5), image(5))
    assert torch.equal(image(5), image(6)) == (CAUTION not in model_card(family, info(stochastic)))


def test_a_saved_card_is_that_card(family: ModelFamily, tmp_path: Path) -> None:
    family.pipeline.register_to_config(_name_or_path="some/base")
    save_student(tmp_path, family, info())
    assert CAUTION in (tmp_path / "README.md").read_text(encoding="utf-8")
