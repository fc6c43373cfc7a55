"""A base comes without adapters and a compiler's wrapper: otherwise it is not the teacher that it looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.families.targets import adapters_of
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, save_student

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BRANCHES = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


def digits_pipeline() -> Any:
    return DiffusionPipeline.from_pretrained(digits.teacher_path())


@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
def test_a_loaded_lora_is_refused_in_every_family(kind: str) -> None:
    """Active or switched off: with all adapters off, the teacher would be the base without it."""
    pipeline = TINY_PIPELINES[kind]()
    component = "unet" if "unet" in pipeline.components else "transformer"
    network = getattr(pipeline, component)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), network, adapter_name="style")
    words = f"the pipeline's {component} has adapters already: 'style'.*fuse_lora.. and pipe.unload_lora_weights"
    with pytest.raises(ModelError, match=words):
        load_family(pipeline, torch.float32)
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    with pytest.raises(ModelError, match=words):
        load_family(pipeline, torch.float32)


def test_a_lora_on_a_text_encoder_is_refused() -> None:
    """The student would be trained on its encodings, and its export would not have them."""
    pipeline = digits_pipeline()
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="words")
    with pytest.raises(ModelError, match="text_encoder has adapters already: 'words'"):
        load_family(pipeline, torch.float32)


def test_a_merged_lora_is_honored() -> None:
    """As the message says: fused and unloaded, it is part of the teacher."""
    pipeline = digits_pipeline()
    family = load_family(pipeline, torch.float32, max_sequence_length=4)
    condition, x_t, sigma = family.condition(["three"]), torch.randn(1, 1, 8, 8), torch.tensor([0.5])

    def teacher() -> torch.Tensor:
        with torch.no_grad():
            return family.denoiser(family.roles, TEACHER, condition)(x_t, sigma)

    bare = teacher()
    pipeline.transformer.add_adapter(BRANCHES, adapter_name="style")
    with_lora = teacher()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert adapters_of(pipeline.transformer) == []
    family = load_family(pipeline, torch.float32, max_sequence_length=4)
    assert (teacher() - with_lora).abs().max() < 1e-5 < (bare - with_lora).abs().max()


def test_a_pipeline_serves_one_trainer(small_config: Callable[..., RDMConfig], tmp_path: Path) -> None:
    """A second one would replace the first one's student, and a family made before it had one is no way around."""
    pipeline = digits_pipeline()
    before = load_family(pipeline, torch.float32, max_sequence_length=4)
    first = RDMTrainer(pipeline, "dm", small_config(tmp_path / "first"), digits.prompts())
    student = {name: tensor.clone() for name, tensor in first.roles.role_state_dict(STUDENT).items()}
    words = "transformer has adapters already: 'student', 'fake'.*one pipeline serves one trainer"
    with pytest.raises(ModelError, match=words):
        RDMTrainer(pipeline, "dm", small_config(tmp_path / "second"), digits.prompts())
    with pytest.raises(ModelError, match=words):
        RDMTrainer(before, "dm", small_config(tmp_path / "second"), digits.prompts())
    with pytest.raises(ConfigError, match="already has trainable roles"):
        RDMTrainer(first.family, "dm", small_config(tmp_path / "second"), digits.prompts())
    assert all(torch.equal(student[name], t) for name, t in first.roles.role_state_dict(STUDENT).items())


def test_a_compiled_backbone_stays_compiled_and_is_exported_under_its_names(tmp_path: Path) -> None:
    """Roles say what they say without a compiler, and no file has the wrapper's prefix."""
    graphs: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph

    found = []
    for compiled in (True, False):
        pipeline = TINY_PIPELINES["PixArtSigmaPipeline"]()
        if compiled:
            pipeline.transformer = torch.compile(pipeline.transformer, backend=backend)
        family = load_family(pipeline, torch.float32, max_sequence_length=4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            family.add_roles({STUDENT: LoraConfig(r=2)})
            for parameter in family.roles.parameters_of(STUDENT).values():
                parameter.data.normal_(std=0.1)
        x_t = torch.randn(1, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
        condition = family.condition(["a fox"])
        for role in (TEACHER, STUDENT):
            with torch.no_grad():
                found.append(family.denoiser(family.roles, role, condition)(x_t, torch.tensor([0.5])))
        if compiled:
            assert len(graphs) >= 2
            assert family.pipeline.transformer is family.backbone
            save_student(tmp_path, family, StudentInfo(4, None, False, 1.0, resolve_rewards("dm"), {}))
    for ours, plain in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    for path in tmp_path.rglob("*"):
        if path.suffix == ".safetensors":
            assert not [name for name in load_file(path) if "_orig_mod" in name]
        elif path.is_file():
            assert "_orig_mod" not in path.read_text()
