"""A student goes into a pipeline of its base and into no other, and what is refused leaves the pipeline as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ModelError, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.families.targets import adapters_of
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, load_student, save_student

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
tiny_sd = TINY_PIPELINES["StableDiffusionPipeline"]
tiny_sd3 = TINY_PIPELINES["StableDiffusion3Pipeline"]


def export(pipeline: Any, folder: Path, weights: str = "lora") -> Path:
    """Save a student of a pipeline that was never trained."""
    family = load_family(pipeline, torch.float32)
    family.add_roles({STUDENT: LoraConfig(r=2) if weights == "lora" else None})
    save_student(folder, family, StudentInfo(4, None, False, 1.0, resolve_rewards("dm"), {}))
    return folder


def state_of(pipeline: Any) -> dict[str, Any]:
    """Return what of a pipeline a student would change."""
    component = "unet" if "unet" in pipeline.components else "transformer"
    network = getattr(pipeline, component)
    return {
        "network": id(network),
        "scheduler": id(pipeline.scheduler),
        "adapters": adapters_of(network),
        "parameters": {name: parameter.detach().clone() for name, parameter in network.named_parameters()},
    }


def assert_refused(pipeline: Any, folder: Path, words: str, **options: bool) -> None:
    """The message says what was wrong, and nothing has changed."""
    before = state_of(pipeline)
    with pytest.raises(ModelError, match=words):
        load_student(pipeline, folder, **options)
    after = state_of(pipeline)
    assert before.pop("parameters").keys() == after.pop("parameters").keys()
    assert before == after


def with_weights_moved(pipeline: Any, share: float) -> Any:
    """Change every weight by a share of it."""
    component = "unet" if "unet" in pipeline.components else "transformer"
    with torch.no_grad():
        for parameter in getattr(pipeline, component).parameters():
            parameter.mul_(1 + share)
    return pipeline


@pytest.mark.parametrize("other_base", [False, True])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_another_family_is_refused(tmp_path: Path, weights: str, other_base: bool) -> None:
    """Whatever is asked for: none of its tensors has a place there."""
    export(tiny_sd3(), tmp_path, weights)
    for kind in ("FluxPipeline", "StableDiffusionPipeline"):
        words = f"is for a StableDiffusion3Pipeline with a SD3Transformer2DModel; got a {kind} with"
        assert_refused(TINY_PIPELINES[kind](), tmp_path, words, other_base=other_base)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_another_family_of_the_same_class_of_networks_is_refused(tmp_path: Path, weights: str) -> None:
    """Stable Diffusion and SDXL are both a UNet2DConditionModel."""
    export(tiny_sd(), tmp_path, weights)
    sdxl = TINY_PIPELINES["StableDiffusionXLPipeline"]
    assert_refused(sdxl(), tmp_path, "trained on another base than this StableDiffusionXLPipeline: its .* is .* here")
    if weights == "lora":
        assert_refused(sdxl(), tmp_path, "do not fit this UNet2DConditionModel: .* tensors", other_base=True)


@pytest.mark.parametrize("other_base", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_another_prediction_type_is_refused(tmp_path: Path, ours: str, theirs: str, other_base: bool) -> None:
    """The networks are alike to the last tensor, and what they return means something else."""
    export(tiny_sd(prediction_type=ours), tmp_path)
    words = f"predicts '{ours}', and this StableDiffusionPipeline '{theirs}'"
    assert_refused(tiny_sd(prediction_type=theirs), tmp_path, words, other_base=other_base)


def test_another_base_of_the_family_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Weights tell bases apart: those of another seed, and those that were moved by a percent."""
    export(tiny_sd3(), tmp_path)
    words = "another base than this StableDiffusion3Pipeline: .* sampled tensors differ.*other_base=True"
    for other in (tiny_sd3(seed=1), with_weights_moved(tiny_sd3(), 0.01)):
        assert_refused(other, tmp_path, words)
        load_student(other, tmp_path, other_base=True)
        assert adapters_of(other.transformer) == ["default_0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_known_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Trained in one, sampled in another."""
    export(tiny_sd3().to(torch.bfloat16), tmp_path / "bfloat16")
    export(tiny_sd3(), tmp_path / "float32")
    for folder in ("bfloat16", "float32"):
        pipeline = tiny_sd3().to(dtype)
        assert load_student(pipeline, tmp_path / folder)["num_inference_steps"] == 4
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_a_full_copy_replaces_the_weights_so_they_may_differ(tmp_path: Path) -> None:
    """Only the config has to agree; a compiled network is not silently replaced by one that is not."""
    export(tiny_sd3(), tmp_path, "full")
    pipeline = tiny_sd3(seed=1)
    load_student(pipeline, tmp_path)
    wanted = dict(tiny_sd3().transformer.named_parameters())
    assert all(torch.equal(wanted[name], p) for name, p in pipeline.transformer.named_parameters())
    pipeline = tiny_sd3()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert_refused(pipeline, tmp_path, "the pipeline's transformer is compiled; load the student first")


def test_a_pipeline_with_adapters_is_refused(tmp_path: Path) -> None:
    """The student was trained on the base, not on the base with another LoRA."""
    export(tiny_sd3(), tmp_path)
    pipeline = tiny_sd3()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipeline.transformer, adapter_name="style")
    assert_refused(pipeline, tmp_path, "has adapters already: 'style'")


def with_one_more(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "transformer.nowhere.lora_A.weight": torch.zeros(2, 4)}


def with_another_shape(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in tensors if name.endswith("to_q.lora_B.weight"))
    return {**tensors, name: torch.zeros(3, 2)}


@pytest.mark.parametrize("damage", [with_one_more, with_another_shape, lambda tensors: {}])
def test_weights_that_would_not_be_taken_are_refused(
    tmp_path: Path, damage: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Also with other_base: every tensor has to have its layer."""
    file = export(tiny_sd3(), tmp_path) / "pytorch_lora_weights.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    words = "do not fit this SD3Transformer2DModel: . of"
    assert_refused(tiny_sd3(), tmp_path, words, other_base=True)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("base.json", r"is not whole: it has no base\.json"),
        ("inference.json", r"is not whole: it has no inference\.json"),
        ("scheduler/scheduler_config.json", "is not whole: it has no scheduler/"),
        ("pytorch_lora_weights.safetensors", None),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, missing: str, words: str | None) -> None:
    """Before anything about the pipeline changes; PEFT's file is enough of the weights."""
    (export(tiny_sd3(), tmp_path) / missing).unlink()
    if words is None:
        load_student(tiny_sd3(), tmp_path)
    else:
        assert_refused(tiny_sd3(), tmp_path, words)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """It is named."""
    file = export(tiny_sd3(), tmp_path) / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert_refused(tiny_sd3(), tmp_path, r"weights in '.*pytorch_lora_weights\.safetensors' cannot be read")


def test_a_lora_that_followed_a_full_copy_into_its_folder_is_what_is_loaded(tmp_path: Path) -> None:
    """The copy's folder is still there, and is not the student any more."""
    export(tiny_sd3(), tmp_path, "full")
    export(tiny_sd3(), tmp_path, "lora")
    pipeline = tiny_sd3()
    load_student(pipeline, tmp_path)
    assert adapters_of(pipeline.transformer) == ["default_0"]


def test_what_is_kept_of_the_base(tmp_path: Path) -> None:
    """A few kilobytes, plain to read, the same whether a base is quantized or not as far as it can be compared."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    file = export(pipeline, tmp_path) / "base.json"
    kept = json.loads(file.read_text())
    assert file.stat().st_size < 32_000
    assert kept["pipeline"] == "StableDiffusion3Pipeline"
    assert (kept["component"], kept["network"]) == ("transformer", "SD3Transformer2DModel")
    assert (kept["prediction"], kept["weights"]) == ("flow", "lora")
    assert kept["config"]["num_layers"] == pipeline.transformer.config.num_layers
    assert not [name for name in kept["config"] if name.startswith("_")]
    assert 10 < len(kept["samples"]) <= 24
    assert all(len(values) <= 16 for values in kept["samples"].values())
    assert not [name for name in kept["samples"] if "lora" in name or "base_layer" in name]
