"""Sana: its schedulers, its transformer's time, and the instruction in front of prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from pipeline_calls import calls_of
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER


def sana(scheduler: Any = None) -> Any:
    """Return a tiny pipeline, with another scheduler if one is given."""
    pipeline = TINY_PIPELINES["SanaPipeline"]()
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    return pipeline


def family_of(pipeline: Any) -> ModelFamily:
    """Return its family."""
    return load_family(pipeline, torch.float32)


# ---- Schedulers -------------------------------------------------------------------------------------------------


def test_both_published_schedulers_are_followed() -> None:
    """Each calls its shift by another name, and may carry the other's name along from a conversion."""
    published = sana().scheduler
    assert family_of(sana()).base_shift((4, 4, 8)) == 3.0
    assert family_of(sana(FlowMatchEulerDiscreteScheduler(shift=5.0))).base_shift((4, 4, 8)) == 5.0
    converted = FlowMatchEulerDiscreteScheduler.from_config(published.config, shift=2.0)
    assert converted.config["flow_shift"] == 3.0
    assert family_of(sana(converted)).base_shift((4, 4, 8)) == 2.0
    back = DPMSolverMultistepScheduler.from_config(converted.config, flow_shift=4.0)
    assert back.config["shift"] == 2.0
    assert family_of(sana(back)).base_shift((4, 4, 8)) == 4.0


def test_the_students_grid_has_the_bases_shift() -> None:
    """One, and where four even levels go with a shift of 3; the pipeline call sets no other."""
    family = family_of(sana())
    expected = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    grid = family.student_sigmas(4, None)
    assert grid[0] == 1.0
    assert grid[-1] == pytest.approx(expected[-1], abs=1e-6)
    pipeline = family.pipeline
    pipeline.scheduler = family.student_scheduler(4, None)
    pipeline("a fox", **family.inference_call(4), height=32, width=32, output_type="latent")
    assert pipeline.scheduler.sigmas[:-1].tolist() == grid


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DPMSolverMultistepScheduler(), "got prediction_type='epsilon' and use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "got prediction_type='epsilon'"),
        (SCMScheduler(), "got SCMScheduler"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "got UniPCMultistep"),
    ],
)
def test_other_schedulers_are_refused(scheduler: Any, message: str) -> None:
    """Noise levels or predictions that are not a flow's, and classes that nobody has checked."""
    with pytest.raises(ModelError, match=message):
        family_of(sana(scheduler))


# ---- The transformer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.001, 2.0])
def test_times_are_scaled_as_the_transformer_says(scale: float) -> None:
    """Number for number what the pipeline sends, in float32."""
    pipeline = sana()
    pipeline.transformer.register_to_config(timestep_scale=scale)
    family = family_of(pipeline)
    pipeline.scheduler = family.student_scheduler(2, None)
    x_t, condition = torch.randn(1, *family.latent_shape(32, 32)), family.condition(["a fox"])
    call = family.inference_call(2) | {"height": 32, "width": 32, "output_type": "latent"}
    theirs = calls_of(pipeline, "transformer", lambda: pipeline("a fox", **call))

    def predict() -> None:
        for sigma in pipeline.scheduler.sigmas[:-1]:
            family.predict(family.roles, TEACHER, x_t, sigma[None], condition)

    ours = calls_of(pipeline, "transformer", predict)
    assert len(ours) == 2
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own["timestep"], their["timestep"])
        assert own["timestep"].dtype == their["timestep"].dtype == torch.float32
    assert theirs[0]["timestep"] == 1000 * scale


def test_a_variance_is_dropped_as_the_pipeline_drops_it() -> None:
    """Of an output with twice the latents' channels, the first half is the flow."""
    pipeline = sana()
    config = dict(pipeline.transformer.config) | {"out_channels": 8}
    pipeline.register_modules(transformer=SanaTransformer2DModel.from_config(config).eval())
    family = family_of(pipeline)
    latents = torch.randn(1, *family.latent_shape(32, 64))
    with torch.no_grad():
        flow = family.predict(family.roles, TEACHER, latents, torch.ones(1), family.condition(["a fox"]))
    pipeline.scheduler = family.student_scheduler(1, None)
    call = family.inference_call(1) | {"height": 32, "width": 64, "output_type": "latent"}
    torch.testing.assert_close(pipeline("a fox", latents=latents, **call).images, latents - flow)


# ---- Prompts ----------------------------------------------------------------------------------------------------


def test_prompts_have_an_instruction_and_missing_ones_have_not() -> None:
    """A prompt's tokens follow the instruction's last; an empty prompt has that, a missing one is <bos> alone."""
    family = family_of(sana())
    condition = family.condition(["fox", "", None])
    # Gemma's tokens for "fox" are three letters here, and the instruction ends in a space.
    assert condition["encoder_attention_mask"].sum(1).tolist() == [5, 2, 1]
    assert condition["encoder_attention_mask"][0, :5].all()
    embeds = condition["encoder_hidden_states"]
    torch.testing.assert_close(embeds[0, :2], embeds[1, :2])  # causal: what follows changes nothing before it
    torch.testing.assert_close(embeds[0, 0], embeds[2, 0])
    assert not torch.allclose(embeds[1, 1], embeds[2, 1], atol=1e-3)
