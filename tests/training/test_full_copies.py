"""Roles that are full copies of the base, not adapters: training, resuming, export, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from digit_runs import same_bits, weights_of_roles
from safetensors.torch import load_file
from torch import Tensor

from rdm_sdk import ConfigError, RDMTrainer, digits
from rdm_sdk.families.roles import TEACHER

Make = Callable[..., RDMTrainer]
PROMPTS = digits.prompts()[:3]


@pytest.mark.parametrize(("student", "critic"), [("full", "lora"), ("lora", "full"), ("full", "full")])
def test_full_copies_train_beside_the_teacher(make_trainer: Make, tmp_path: Path, student: str, critic: str) -> None:
    """The teacher stays bit for bit; what is trained starts at it and moves; resuming is exact."""
    settings: dict[str, Any] = {"student_weights": student, "critic_weights": critic, "max_steps": 2, "save_steps": 1}
    settings |= {"learning_rate": 1e-3, "save_strategy": "steps", "ema_decay": 0.5}
    trainer = make_trainer(tmp_path / "run", **settings)
    roles, count = trainer.roles, sum(p.numel() for p in trainer.roles.backbone.parameters() if not p.requires_grad)
    x_t = torch.randn(2, *trainer.models.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    condition, sigma = trainer.models.encode(PROMPTS[:2]), torch.tensor([0.7, 0.3])

    def says(role: str) -> Tensor:
        with torch.no_grad():
            return trainer.family.denoiser(roles, role, condition)(x_t, sigma)

    before = says(TEACHER)
    for role, kind in (("student", student), ("fake", critic)):
        assert torch.equal(says(role), before)
        told = sum(p.numel() for p in roles.embedding_parameters_of(role).values())
        assert (told > 0) == (role == "fake")
        size = sum(p.numel() for p in trainer.parameters_of(role)) - told
        assert (size == count) == (kind == "full")
        assert roles.describe(role).startswith("a full copy of the base") == (kind == "full")
    trainer.train()
    assert torch.equal(says(TEACHER), before)
    assert not torch.equal(says("student"), before)
    assert not torch.equal(says("fake"), before)
    again = make_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same_bits(weights_of_roles(again, "student", "fake"), weights_of_roles(trainer, "student", "fake"))
    settings["student_weights"] = "lora" if student == "full" else "full"
    other = make_trainer(tmp_path / "other", **settings)
    with pytest.raises(Exception, match="do not fit"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_copy_of_a_bf16_base_is_trained_in_float32(
    make_trainer: Make, tmp_path: Path, checkpointing: bool
) -> None:
    """Its weights and gradients are float32, whatever the base is loaded in; its export is as the base."""
    settings = {
        "student_weights": "full",
        "bf16": True,
        "activation_checkpointing": checkpointing,
        "learning_rate": 1e-3,
    }
    trainer = make_trainer(tmp_path, **settings)
    assert next(trainer.roles.backbone.parameters()).dtype == torch.bfloat16
    before = weights_of_roles(trainer, "student")
    assert math.isfinite(float(trainer.sample(PROMPTS).mean()))
    trainer.train()
    assert {p.dtype for p in trainer.parameters_of("student")} == {torch.float32}
    assert not same_bits(before, weights_of_roles(trainer, "student"))
    trainer.save_model(str(tmp_path / "student"))
    exported = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


def test_a_full_student_runs_in_plain_diffusers(make_digits_trainer: Make, tmp_path: Path) -> None:
    """The export is the component's folder; a plain pipeline that loads it gives our images."""
    from rdm_sdk.training.export import load_student

    trainer = make_digits_trainer(tmp_path / "run", student_weights="full", learning_rate=1e-3, sampler="ode")
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert 'SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")' in card
    assert "load_lora_weights" not in card
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *trainer.models.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 4, "output_type": "pt"}
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")
    teacher = pipeline(PROMPTS[:2], latents=noise.clone(), **call).images
    load_student(pipeline, tmp_path / "student")
    theirs = pipeline(PROMPTS[:2], latents=noise.clone(), **call).images
    assert (theirs - trainer.sample(PROMPTS[:2], noise=noise)).abs().max() < 1e-4
    assert (theirs - teacher).abs().max() > 1e-3


def test_what_copies_cost_is_said_before_the_run(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen bytes a parameter, for each copy; adapters are not worth a word."""
    make_trainer(tmp_path / "lora")
    assert "full copy" not in caplog.text
    trainer = make_trainer(tmp_path / "full", student_weights="full")
    count = sum(p.numel() for p in trainer.parameters_of("student"))
    assert f"'student' is a full copy of the base: {count:.3g} parameters, {16 * count / 2**30:.2f} GB" in caplog.text
    assert "'fake' is a full copy" not in caplog.text


def test_a_copy_takes_no_lora(make_trainer: Make, tmp_path: Path) -> None:
    """Settings of adapters for a role that has none are a mistake."""
    from peft import LoraConfig

    with pytest.raises(ConfigError, match="peft_config describes adapters, and student_weights='full'"):
        make_trainer(tmp_path, student_weights="full", peft_config=LoraConfig(r=4))
    with pytest.raises(ConfigError, match="fake_peft_config describes adapters, and critic_weights='full'"):
        make_trainer(tmp_path, critic_weights="full", fake_peft_config=LoraConfig(r=4))
