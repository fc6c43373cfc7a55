"""Every family: the backbone gets what its own pipeline sends, and a trained student runs in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_asserts import (
    assert_a_trained_student_runs_in_plain_diffusers,
    assert_the_backbone_gets_what_the_pipeline_sends,
)
from pipeline_calls import PROMPTS, in_the_loop, run_pipeline, size_of
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import RDMConfig, RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BY_DEFAULT = {
    *("StableDiffusion3Pipeline-renoise", "StableDiffusion3Pipeline-ode"),  # a flow
    *("StableDiffusionXLPipeline-renoise", "StableDiffusionXLPipeline-ode"),  # a DDPM
    *("FluxPipeline-ode", "SanaPipeline-renoise"),
}
both_samplers = pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        pytest.param(kind, sampler, id=name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)
        for kind in sorted(TINY_PIPELINES)
        for sampler in ("renoise", "ode")
        for name in [f"{kind}-{sampler}"]
    ],
)
by_family = pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))


@by_family
def test_the_backbone_gets_what_the_pipeline_sends(kind: str, pipelines: dict[str, Any]) -> None:
    """At both guidance branches and every step, our keyword arguments equal the pipeline call's, value for value."""
    assert_the_backbone_gets_what_the_pipeline_sends(pipelines[kind])


@both_samplers
def test_a_trained_student_runs_in_plain_diffusers(
    kind: str, sampler: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    """Training moves the student and leaves the teacher bit for bit; export and plain pipeline give our own images."""
    assert_a_trained_student_runs_in_plain_diffusers(pipelines[kind], sampler, tmp_path)


def test_a_linear_shift_is_mu_itself() -> None:
    """Our fixed shift makes the grid that the scheduler shifts by what the call tells it."""
    for kind in ("exponential", "linear"):
        pipeline = TINY_PIPELINES["FluxPipeline"]()
        config = pipeline.scheduler.config
        pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(config, time_shift_type=kind))
        family = load_family(pipeline, torch.float32)
        shape = family.latent_shape(64, 64)
        ours = family.student_sigmas(4, family.base_shift(shape))
        pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=family.dynamic_mu(shape[1] * shape[2] // 4))
        assert ours == pytest.approx(pipeline.scheduler.sigmas[:4].tolist(), abs=1e-5)


def vae_statistics(kind: str) -> list[dict[str, list[float]]]:
    """Return settings of a VAE that are to be looked at; SDXL's have statistics of their channels, or none."""
    given = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.5, 0.7, 1.2, 0.9]}
    return [{}, given] if kind == "StableDiffusionXLPipeline" else [{}]


@by_family
def test_decoding_gives_the_pipelines_pictures(kind: str) -> None:
    """The pipeline's own latents decode to the pipeline's own images; SDXL with statistics of its channels too."""
    for statistics in vae_statistics(kind):
        pipeline = TINY_PIPELINES[kind]()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.register_to_config(**statistics)
        family = load_family(pipeline, torch.float32)
        size = size_of(family)
        shape = family.latent_shape(**size)
        latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        # Whatever the network says, every step of this scheduler leads to our latents.
        packed = in_the_loop(family, latents)
        pipeline.scheduler.step = lambda *_, packed=packed, **__: (packed,)
        with torch.no_grad():
            theirs = run_pipeline(pipeline, PROMPTS, num_inference_steps=2, output_type="pt", **size)
            torch.testing.assert_close(family.decode(latents), theirs, rtol=0, atol=1e-5)


@by_family
def test_encoding_gives_the_vaes_latents(kind: str) -> None:
    """Images are scaled as the VAE takes them, and its latents come out normalized."""
    for statistics in vae_statistics(kind):
        family = load_family(TINY_PIPELINES[kind](), torch.float32)
        family.pipeline.vae.register_to_config(**statistics)
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        raw = family.to_vae(family.encode_images(images))
        with torch.no_grad():
            encoded = family.pipeline.vae.encode(vae_input(family, images))
        own = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        torch.testing.assert_close(raw.flatten(), own.flatten(), rtol=1e-4, atol=1e-5)


def vae_input(family: ModelFamily, images: Tensor) -> Tensor:
    """Return images as the VAE takes them; Qwen-Image's is for videos."""
    scaled = images * 2 - 1
    return scaled[:, :, None] if type(family.pipeline).__name__ == "QwenImagePipeline" else scaled


@pytest.mark.parametrize("kind", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_guidance_is_told_or_computed_but_not_both(kind: str, tmp_path: Path) -> None:
    """A backbone that is told the scale is told it in every role and asked once; others' teacher is asked twice."""
    args = RDMConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, guidance_scale=2.5, height=32, width=32)
    trainer = RDMTrainer(TINY_PIPELINES[kind](), "dm", args, PROMPTS)
    family, condition = trainer.family, trainer.models.encode(PROMPTS)
    x_t = torch.randn(2, *trainer.models.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 0.3])
    trainer.roles.forwards.clear()
    with torch.no_grad():
        guided = trainer.models.denoiser(TEACHER, condition)(x_t, sigma)
        plain = family.denoiser(family.roles, TEACHER, condition)(x_t, sigma)
        student = trainer.models.denoiser("student", condition)(x_t, sigma)
    told = kind == "FluxPipeline"
    assert trainer.roles.forwards[TEACHER] == (2 if told else 4) + 2
    assert torch.equal(guided, plain) == told
    assert condition["guidance"].tolist() == [2.5, 2.5] if told else "guidance" not in condition
    torch.testing.assert_close(student, plain)
    guide = trainer.judge.context(condition).guide
    assert guide is None if told else guide is not None
