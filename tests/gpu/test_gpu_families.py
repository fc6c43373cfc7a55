"""Every family on CUDA: what it says is what it says on the CPU, and it trains in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from digit_runs import brightness
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import RDMConfig, RDMTrainer
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.training.export import load_student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Diffusers' Euler scheduler under numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

DEVICE = "cuda"
PROMPTS = ["a red fox", "two boats on a lake"]
WHOLE_SIZE = {"SanaPipeline": {"use_resolution_binning": False}}
WHOLE_SIZE["PixArtSigmaPipeline"] = {"use_resolution_binning": False, "clean_caption": False}
by_family = pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))


@pytest.fixture(autouse=True)
def sound_kernels() -> Iterator[None]:
    """Keep TF32 out of what is compared with the CPU, and cuDNN's attention out of what is differentiated.

    The latter returned NaN gradients for the tiny FLUX on an H200 (PyTorch 2.11); the trainer raises then.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(attention)


def train(kind: str, folder: Path, rewards: Any, **settings: Any) -> RDMTrainer:
    """Write a base to `folder / "base"` and train a student of it, with large steps, at 32 pixels or what it needs."""
    TINY_PIPELINES[kind]().save_pretrained(folder / "base")
    family = load_family(str(folder / "base"), torch.bfloat16 if settings.get("bf16") else torch.float32)
    size = -(-32 // family.size_unit) * family.size_unit
    args = RDMConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=2,
        critic_steps=1,
        learning_rate=1e-2,
        guidance_scale=1.0 if family.guidance == "none" else 2.0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        use_cpu=DEVICE == "cpu",
        height=size,
        width=2 * size,
        **settings,
    )
    trainer = RDMTrainer(family, rewards, args, PROMPTS, peft_config=LoraConfig(r=4, lora_alpha=12))
    trainer.train()
    return trainer


@by_family
def test_a_family_says_what_it_says_on_the_cpu(kind: str) -> None:
    """Prompts, the teacher's x_0, pictures, and latents of pictures."""
    said = {}
    for device in ("cpu", DEVICE):
        family = load_family(TINY_PIPELINES[kind](), torch.float32)
        family.to(torch.device(device))
        size = -(-32 // family.size_unit) * family.size_unit
        latents = torch.randn(2, *family.latent_shape(size, 2 * size), generator=torch.Generator().manual_seed(0))
        condition = family.condition(PROMPTS, 2.0)
        with torch.no_grad():
            x_0 = family.denoiser(family.roles, TEACHER, condition)(
                latents.to(device), torch.tensor([0.8, 0.4], device=device)
            )
            images = family.decode(latents.to(device))
            encoded = family.encode_images(images.clamp(0, 1))
        said[device] = condition | {"x_0": x_0, "images": images, "encoded": encoded}
        assert {tensor.device.type for tensor in said[device].values()} == {device}
    for name, expected in said["cpu"].items():
        got = said[DEVICE][name].cpu()
        if expected.is_floating_point():
            torch.testing.assert_close(
                got, expected, rtol=1e-3, atol=1e-3, msg=lambda told, name=name: f"{name}: {told}"
            )
        else:
            assert torch.equal(got, expected), name


@by_family
def test_a_family_trains_in_bf16(kind: str, tmp_path: Path) -> None:
    """With a pixel reward and activation checkpointing: three finite steps, and both roles move."""
    rewards = ["dm", (brightness, 0.1)]
    trainer = train(kind, tmp_path, rewards, max_steps=3, bf16=True, activation_checkpointing=True)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for role in ("student", "fake"):
        parameters = trainer.parameters_of(role)
        assert {parameter.device.type for parameter in parameters} == {DEVICE}
        assert any(bool(p.any()) for name, p in trainer.roles.parameters_of(role).items() if "lora_B" in name)
    assert trainer.sample(PROMPTS, seed=0).isfinite().all()


@by_family
def test_a_student_trained_here_runs_in_plain_diffusers(kind: str, tmp_path: Path) -> None:
    """Export, plain pipeline on the device, and the trainer's own sampler make the same pictures."""
    trainer = train(kind, tmp_path, "dm", max_steps=3, sampler="ode")
    family, args = trainer.family, trainer.args
    noise = torch.randn(2, *family.latent_shape(args.height, args.width), generator=torch.Generator().manual_seed(3))
    ours = trainer.sample(PROMPTS, noise=noise)
    trainer.save_model(str(tmp_path / "student"))

    plain = DiffusionPipeline.from_pretrained(tmp_path / "base").to(DEVICE)
    plain.set_progress_bar_config(disable=True)
    scheduler = family.student_scheduler(4, trainer.models.shift, stochastic=False)
    plain.scheduler = type(scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")
    call = load_student(plain, tmp_path / "student") | WHOLE_SIZE.get(kind, {})
    latents = family.pack(noise.to(DEVICE))
    theirs = plain(prompt=PROMPTS, latents=latents, output_type="pt", **call).images
    assert theirs.device.type == DEVICE
    assert (theirs.float() - ours.float()).abs().max() < 1e-3
