"""`Sampler` with every family: what it samples of a base is what was asked for, at its size, on its grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_pipelines import TINY_PIPELINES, tiny_flux, tiny_sd
from transformers import CLIPImageProcessor
from usual_families import usual_families

from rdm_sdk import ConfigError, DataError, evaluate
from rdm_sdk.evaluation.candidates import Candidate, teacher_candidate
from rdm_sdk.evaluation.sampling import Sampled, Sampler
from rdm_sdk.testing.tiny import tiny_clip_config

Settings = dict[str, Any]
LONG = teacher_candidate(1, {"max_sequence_length": 70})


def sampler_of(pipeline: Any, guidance_scale: float = 1.0, **settings: Any) -> Sampler:
    return Sampler(pipeline, guidance_scale, 0, 2, device="cpu", **settings)


def sampled(sampler: Sampler, candidate: Candidate) -> Sampled:
    return sampler.images(candidate, ["a fox", "a hen"], "rows", lambda count: None)


@usual_families
def test_a_base_in_bfloat16_with_its_vae_in_float32(kind: str) -> None:
    """As bases are loaded here: some pipelines hand the backbone's latents to the VAE as they are."""
    pipeline = TINY_PIPELINES[kind]().to(torch.bfloat16)
    pipeline.vae.to(torch.float32)
    decode = pipeline.vae.decode
    images = sampled(sampler_of(pipeline), teacher_candidate(2, {})).images
    assert images.dtype == torch.uint8
    assert images.float().std() > 0
    assert pipeline.vae.decode == decode  # left as it was
    assert "decode" not in vars(pipeline.vae)


@pytest.mark.parametrize("kind", ["SanaPipeline", "PixArtSigmaPipeline"])
def test_the_teacher_is_sampled_at_the_size_that_was_asked_for(kind: str) -> None:
    """By themselves these pipelines take the nearest of a list of sizes, and scale the image."""
    pipeline, seen = TINY_PIPELINES[kind](), []

    def look(_: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(tuple(named.get("hidden_states", given[0] if given else None).shape))

    pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    sampler, candidate = sampler_of(pipeline), teacher_candidate(2, {"height": 64, "width": 128})
    images = sampled(sampler, candidate).images
    assert {shape[1:] for shape in seen} == {sampler.family.latent_shape(64, 128)}
    assert images.shape[2:] == (64, 128)
    assert sampler.call_of(candidate)["use_resolution_binning"] is False
    assert sampler.call_of(candidate).get("clean_caption") is (False if "PixArt" in kind else None)


def test_whose_images_are_broken_is_named() -> None:
    """Of several students one may have diverged, and nobody could tell which."""
    pipeline = tiny_flux()
    sampler = sampler_of(pipeline)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="the images of teacher, 2 steps hold NaN or infinite pixels: 2 of 2"):
        sampled(sampler, teacher_candidate(2, {}))


def test_the_grid_is_that_of_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX shifts its grid by the number of tokens: at every size as the plain pipeline does."""
    pipeline = tiny_flux()
    levels: dict[str, list[float]] = {"plain": [], "here": []}

    def recording(scheduler: Any, into: str) -> Any:
        step = scheduler.step

        def recorded(*given: Any, **named: Any) -> Any:
            levels[into].append(float(scheduler.sigmas[len(levels[into])]))
            return step(*given, **named)

        scheduler.step = recorded
        return scheduler

    scheduler = pipeline.scheduler
    pipeline.scheduler = recording(copy.deepcopy(scheduler), "plain")
    pipeline(prompt=["a fox"], num_inference_steps=4, height=64, width=64, guidance_scale=1.0, output_type="latent")
    pipeline.scheduler = scheduler
    sampler = sampler_of(pipeline)
    made: Callable[..., Any] = sampler.family.student_scheduler
    monkeypatch.setattr(
        sampler.family, "student_scheduler", lambda *given, **named: recording(made(*given, **named), "here")
    )
    candidate = teacher_candidate(4, {"height": 64, "width": 64})
    with sampler._loaded(candidate) as call:
        pipeline(prompt=["a fox"], output_type="latent", **call)
    assert levels["here"] == pytest.approx(levels["plain"], abs=1e-3)
    default = sampler.family.base_shift(sampler.family.latent_shape())
    assert sampler.family.base_shift(sampler.family.latent_shape(64, 64)) != pytest.approx(default, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "steps", "call", "message"),
    [
        ("StableDiffusionPipeline", 30, {}, "teacher, 30 steps: num_inference_steps=30 does not divide"),
        ("FluxPipeline", 4, {"height": 36}, "teacher, 4 steps: height and width must be positive multiples of"),
        ("SanaPipeline", 4, {"width": 33}, "teacher, 4 steps: height and width must be positive multiples of"),
    ],
)
def test_steps_and_sizes_are_checked_before_anything_is_sampled(
    kind: str, steps: int, call: Settings, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference, which comes first, takes hours."""
    monkeypatch.setattr(Sampler, "images", None)
    settings: Settings = {"features": lambda images: images.flatten(1), "samples": 16, "reference_steps": 4}
    with pytest.raises(ConfigError, match=message):
        evaluate(TINY_PIPELINES[kind](), ["a fox"], teacher_steps=[steps], call=call, **settings)


def test_a_size_that_a_student_cannot_have_is_refused() -> None:
    """Its scheduler is its own, so that nothing else asks for the shape of its latents."""
    student = Candidate("mine", 4, Path("student"), {"height": 36}, "")
    with pytest.raises(ConfigError, match="mine: height and width must be positive multiples of"):
        sampler_of(tiny_flux(), candidates=[student])


@pytest.mark.parametrize(
    ("kind", "scale", "settings", "message"),
    [
        ("StableDiffusion3Pipeline", 0.5, {}, "takes what is below 1 for no guidance; use 1 or more"),
        ("ZImagePipeline", 0.0, {}, "takes what is below 1 for no guidance; use 1 or more"),
        ("schnell", 5.0, {}, "was distilled without guidance, and its pipeline ignores it; use 1"),
        ("StableDiffusionPipeline", 1.0, {"candidates": [LONG]}, "max_sequence_length=70"),
    ],
)
def test_what_the_pipeline_would_ignore_is_refused(kind: str, scale: float, settings: Settings, message: str) -> None:
    """Scales without an effect, and lengths that the call swallows."""
    pipeline = tiny_flux(guidance_embeds=False) if kind == "schnell" else TINY_PIPELINES[kind]()
    with pytest.raises(ConfigError, match=message):
        sampler_of(pipeline, scale, **settings)


def test_images_that_the_safety_checker_made_black_are_counted(tmp_path: Any) -> None:
    """Whoever reads the figures is told, also when the images come from the cache."""
    pipeline = tiny_sd()
    checker = StableDiffusionSafetyChecker(tiny_clip_config())
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(-2.0)  # it flags every image
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(safety_checker=checker, feature_extractor=processor)
    settings: Settings = {"features": lambda images: images.flatten(1)[:, :8], "samples": 16, "reference_steps": 2}
    for _ in range(2):
        result = evaluate(pipeline, ["a fox"], teacher_steps=[1], output=tmp_path, progress=False, **settings)
        told = [note for note in result.notes if "made black by the base's safety checker" in note]
        assert [note.split(" were")[0] for note in told] == [
            "16 of 16 images of teacher, 2 steps",
            "16 of 16 images of teacher, 1 step",
        ]
