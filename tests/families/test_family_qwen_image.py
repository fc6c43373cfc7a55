"""Qwen-Image's own: guidance of kept length, masks where texts differ in length, the shift by image size."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from family_asserts import assert_guides_as_the_pipeline, assert_recomputed_gradients_are_equal
from pipeline_calls import PROMPTS, assert_same_inputs, calls_of, run_pipeline
from tiny_pipelines import tiny_qwen_image

from rdm_sdk import ConfigError, ModelError
from rdm_sdk.families.flow import unpack
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = {"height": 32, "width": 64}


@pytest.fixture
def pipeline() -> Any:
    made = tiny_qwen_image()
    made.set_progress_bar_config(disable=True)
    return made


def test_guidance_is_the_pipelines(pipeline: Any) -> None:
    """Linear in the flow, then brought to the length of the flow with the prompt, token by token."""
    family = load_family(pipeline, torch.float32)
    assert_guides_as_the_pipeline(family, 3.0, true_cfg_scale=3.0, negative_prompt=[" ", " "])


def test_guidance_of_two_equal_predictions_of_nothing_is_finite(pipeline: Any) -> None:
    """A flow of zero has no length to divide by."""
    family = load_family(pipeline, torch.float32)
    x_t = torch.randn(2, *family.latent_shape(**SIZE))
    assert torch.equal(family.guide(x_t, torch.tensor([0.5, 0.5]), x_t, x_t, 3.0), x_t)


@pytest.mark.parametrize("length", [None, 14, 8])
def test_texts_of_several_lengths_reach_the_backbone_as_from_the_pipeline(pipeline: Any, length: int | None) -> None:
    """With a mask where they are padded, with none where they are alike, cut where they are too long."""
    family = load_family(pipeline, torch.float32, max_sequence_length=length)
    x_t = torch.randn(2, *family.latent_shape(**SIZE), generator=torch.Generator().manual_seed(0))
    for prompts, masked in ((PROMPTS, True), (PROMPTS[:1] * 2, False), (PROMPTS[1:] * 2, False)):
        call = family.inference_call(2) | {"latents": family.pack(x_t), "output_type": "latent", **SIZE}
        theirs, _ = calls_of(pipeline, "transformer", lambda p=prompts, call=call: run_pipeline(pipeline, p, **call))
        assert ("encoder_hidden_states_mask" in theirs) is (masked and length != 8)
        condition = family.condition(prompts)
        assert condition["encoder_hidden_states"].shape[1] == (length or 512)
        assert condition["encoder_hidden_states_mask"].shape == (2, length or 512)
        (ours,) = calls_of(
            pipeline,
            "transformer",
            lambda c=condition: family.predict(family.roles, TEACHER, x_t, torch.ones(2), c),
        )
        assert_same_inputs(ours, theirs)


def test_a_prompts_prediction_does_not_depend_on_the_prompt_beside_it(pipeline: Any) -> None:
    family = load_family(pipeline, torch.float32)
    x_t, sigma = torch.randn(2, *family.latent_shape(**SIZE)), torch.tensor([0.7, 0.4])
    with torch.no_grad():
        both = family.denoiser(family.roles, TEACHER, family.condition(PROMPTS))(x_t, sigma)
        for i, prompt in enumerate(PROMPTS):
            alone = family.denoiser(family.roles, TEACHER, family.condition([prompt]))(x_t[i : i + 1], sigma[i, None])
            torch.testing.assert_close(both[i], alone[0], rtol=1e-4, atol=1e-5)


def test_time_is_rounded_as_the_pipeline_rounds_it(pipeline: Any) -> None:
    """In bf16 the pipeline casts its timestep before it divides it."""
    pipeline.to(torch.bfloat16)
    family = load_family(pipeline, torch.bfloat16)
    latents = family.pack(torch.randn(2, *family.latent_shape(**SIZE)))
    call = {"latents": latents, "output_type": "latent", "num_inference_steps": 7, "true_cfg_scale": 1.0, **SIZE}
    theirs = calls_of(pipeline, "transformer", lambda: run_pipeline(pipeline, PROMPTS, **call))
    for sigma, their in zip(pipeline.scheduler.sigmas, theirs, strict=False):
        x_t = unpack(their["hidden_states"], 8, 16).float()
        run = (x_t, sigma.expand(2), family.condition(PROMPTS))
        (own,) = calls_of(pipeline, "transformer", lambda run=run: family.predict(family.roles, TEACHER, *run))
        assert own["timestep"].dtype == torch.bfloat16
        assert torch.equal(own["timestep"], their["timestep"])
        assert torch.equal(own["hidden_states"], their["hidden_states"])


@pytest.mark.parametrize("size", [(32, 32), (64, 128)])
def test_the_students_grid_is_the_bases_without_its_terminal(pipeline: Any, size: tuple[int, int]) -> None:
    """The shift grows with the image; the last level of the base, 0.02, is replaced by the uniform grid's."""
    settings = {"base_image_seq_len": 16, "max_image_seq_len": 512, "shift_terminal": None}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    family = load_family(pipeline, torch.float32)
    run_pipeline(pipeline, ["a fox"], height=size[0], width=size[1], **family.inference_call(4))
    shift = family.base_shift(family.latent_shape(*size))
    assert family.student_sigmas(4, shift) == pytest.approx(pipeline.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert family.student_sigmas(1, shift) == [1.0]


def test_the_inference_call_makes_the_pipeline_complain_of_nothing(
    pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns of a guidance_scale, and of a true_cfg_scale without a negative prompt."""
    family = load_family(pipeline, torch.float32)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        run_pipeline(pipeline, ["a fox"], **family.inference_call(2, 4.0), **SIZE)
        assert not caplog.records
        run_pipeline(pipeline, ["a fox"], **family.inference_call(2) | {"guidance_scale": 1.0}, **SIZE)
        assert "ignored" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("other", ["teacher", "fake"])
def test_gradients_flow_through_recomputed_blocks(other: str) -> None:
    assert_recomputed_gradients_are_equal(tiny_qwen_image, other)


def test_features_are_the_images(pipeline: Any) -> None:
    """Of a block's two streams, the text's and the image's."""
    family = load_family(pipeline, torch.float32)
    assert family.feature_block() is pipeline.transformer.transformer_blocks[0]
    extract = family.features(family.roles, TEACHER, family.condition(PROMPTS))
    assert extract(torch.randn(2, *family.latent_shape(**SIZE)), torch.tensor([0.5, 0.6])).shape[1] == 32


def test_images_have_gradients_through_the_video_vae(pipeline: Any) -> None:
    """Its caches of frames do not cut the graph."""
    family = load_family(pipeline, torch.float32)
    latents = (0.1 * torch.randn(2, *family.latent_shape(**SIZE))).requires_grad_()
    images = family.decode(latents)
    assert images.shape == (2, 3, 32, 64)
    images.sum().backward()
    assert latents.grad is not None
    assert latents.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("length", [0, 1025])
def test_lengths_that_the_pipeline_does_not_take(pipeline: Any, length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_sequence_length={length} is not between 1 and 1024"):
        load_family(pipeline, torch.float32, max_sequence_length=length)


def test_a_backbone_that_is_told_its_guidance_is_refused(pipeline: Any) -> None:
    """Diffusers cannot run one either, so there is nothing to follow."""
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(TypeError):
        run_pipeline(pipeline, ["a fox"], num_inference_steps=2, guidance_scale=3.0, true_cfg_scale=1.0, **SIZE)
    with pytest.raises(ModelError, match="guidance_embeds"):
        load_family(pipeline, torch.float32)
