"""Stable Diffusion and SDXL: predictions, grids and timesteps, no prompt, and what they do not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from pipeline_calls import calls_of, run_pipeline
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError, ModelError
from rdm_sdk.families.load import load_family

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_sizes(kind: str) -> None:
    """Multiples of what the VAE and the UNet's levels shrink; the default is the UNet's."""
    pipeline = TINY_PIPELINES[kind]()
    family, factor = load_family(pipeline, torch.float32), pipeline.vae_scale_factor
    assert family.size_unit == 2 * factor  # of two levels, the second is half as large
    assert family.default_size == (pipeline.unet.config.sample_size * factor,) * 2


def test_v_prediction_is_recognized() -> None:
    """Stable Diffusion 2's prediction is read from its scheduler."""
    assert load_family(TINY_PIPELINES["StableDiffusionPipeline"](), torch.float32).prediction == "eps"
    pipeline = TINY_PIPELINES["StableDiffusionPipeline"](prediction_type="v_prediction")
    assert load_family(pipeline, torch.float32).prediction == "v"


def test_the_student_keeps_the_bases_training_steps() -> None:
    """Betas and their rescaling to zero terminal signal go into the student's schedulers."""
    pipeline = TINY_PIPELINES["StableDiffusionPipeline"](prediction_type="v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    family = load_family(pipeline, torch.float32)
    for stochastic in (True, False):
        scheduler = family.student_scheduler(4, None, stochastic)
        assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
        assert scheduler.config.prediction_type == "v_prediction"


def test_timesteps_of_noise_levels(pipelines: dict[str, Any]) -> None:
    """Integers on the training steps, rising in between, held at both ends."""
    family = load_family(pipelines["StableDiffusionPipeline"], torch.float32)
    assert torch.equal(family.timesteps(family.train_sigmas), torch.arange(1000.0))
    between = family.timesteps((family.train_sigmas[:-1] + family.train_sigmas[1:]) / 2)
    assert ((between > torch.arange(999.0)) & (between < torch.arange(1.0, 1000.0))).all()
    assert family.timesteps(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


def test_no_sdxl_prompt_is_the_pipelines_missing_negative_prompt(pipelines: dict[str, Any]) -> None:
    """Zeros, as the base was trained; other prompts beside it are untouched."""
    family = load_family(pipelines["StableDiffusionXLPipeline"], torch.float32)
    condition = family.condition([None, "a fox"])
    for tensor in condition.values():
        assert not tensor[0].any()
        assert tensor[1].any()


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_bad_input_is_refused(kind: str, pipelines: dict[str, Any]) -> None:
    """Sizes, shifts, grids and token counts that the family does not have, and schedulers it cannot follow."""
    family = load_family(pipelines[kind], torch.float32)
    with pytest.raises(ConfigError, match=r"positive multiples of \d+ for .*; got 33 x 64"):
        family.latent_shape(33, 64)
    with pytest.raises(ConfigError, match=r"shift=3\.0 is for rectified flows"):
        family.student_scheduler(4, 3.0)
    with pytest.raises(ConfigError, match="num_inference_steps=3 does not divide the 1000 training steps"):
        family.student_sigmas(3, None)
    with pytest.raises(ConfigError, match="whose number of tokens is fixed"):
        load_family(pipelines[kind], torch.float32, max_sequence_length=64)
    other = TINY_PIPELINES[kind]()
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config, prediction_type="flow")
    with pytest.raises(ModelError, match="got PNDMScheduler with prediction_type='flow'"):
        load_family(other, torch.float32)


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_that_is_told_its_guidance_is_refused(kind: str) -> None:
    """The pipeline passes an embedding of the scale, which training does not; LCM-distilled bases are such."""
    pipeline = TINY_PIPELINES[kind]()
    pipeline.set_progress_bar_config(disable=True)
    config = dict(pipeline.unet.config) | {"time_cond_proj_dim": 8, "_use_default_values": []}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    call = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    (theirs,) = calls_of(pipeline, "unet", lambda: run_pipeline(pipeline, ["a fox"], **call))
    assert theirs["timestep_cond"].shape == (1, 8)
    with pytest.raises(ModelError, match=r"the unet of .* has time_cond_proj_dim.*load a base without it"):
        load_family(pipeline, torch.float32)


def test_the_deterministic_grid_is_the_stochastic_one(pipelines: dict[str, Any]) -> None:
    """LCM's grid and DDIM's are one, for every number of steps that is let through."""
    family = load_family(pipelines["StableDiffusionPipeline"], torch.float32)
    for num_steps in (1, 2, 4, 5, 8):
        grids = []
        for stochastic in (True, False):
            scheduler = family.student_scheduler(num_steps, None, stochastic)
            scheduler.set_timesteps(num_steps)
            grids.append(scheduler.timesteps.tolist())
        assert grids[0] == grids[1]
        assert grids[0][0] == 999
    assert isinstance(family.student_scheduler(4, None, stochastic=False), DDIMScheduler)
