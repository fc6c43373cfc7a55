"""Every family: bad input gets an error that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from pipeline_calls import PROMPTS
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError, ModelError, ModelFamily, RDMConfig, RDMTrainer
from rdm_sdk.families.load import load_family
from rdm_sdk.families.pixart import PixArtFamily

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
by_family = pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))


@by_family
def test_sizes_that_do_not_divide_are_refused(kind: str, pipelines: dict[str, Any]) -> None:
    """With the unit that they must be multiples of."""
    family = load_family(pipelines[kind], torch.float32)
    unit = family.size_unit
    for height, width in ((unit + 1, unit), (unit, unit + 1), (0, unit), (-unit, unit)):
        with pytest.raises(ConfigError, match=rf"positive multiples of {unit} .*got {height} x {width}"):
            family.latent_shape(height, width)


def test_sizes_beyond_the_position_embedding_are_refused(pipelines: dict[str, Any]) -> None:
    """Of Stable Diffusion 3, whose largest height and width go."""
    family = load_family(pipelines["StableDiffusion3Pipeline"], torch.float32)
    unit = family.size_unit
    largest = unit * family.backbone.config.pos_embed_max_size
    family.latent_shape(largest, largest)
    for height, width in ((largest + unit, unit), (unit, largest + unit)):
        with pytest.raises(ConfigError, match=rf"{height} x {width} pixels are too large .* ends at {largest};"):
            family.latent_shape(height, width)


@by_family
def test_a_missing_part_is_named(kind: str) -> None:
    """A pipeline that was loaded without its text encoder or VAE cannot be trained."""
    for part in ("text_encoder", "vae"):
        pipeline = TINY_PIPELINES[kind]()
        pipeline.register_modules(**{part: None})
        with pytest.raises(ModelError, match=f"this {kind} has no {part}, which training needs; load"):
            load_family(pipeline, torch.float32)


@by_family
def test_a_scheduler_that_cannot_be_followed_is_named(kind: str) -> None:
    """Another kind of noise than the base was trained with would give wrong noise levels, silently."""
    pipeline = TINY_PIPELINES[kind]()
    is_flow = "Flow" in type(pipeline.scheduler).__name__ or kind == "SanaPipeline"
    other: Any = DDIMScheduler() if is_flow else FlowMatchEulerDiscreteScheduler()
    pipeline.register_modules(scheduler=other)
    with pytest.raises(ModelError, match=f"needs a .*; got {type(other).__name__}.*its own scheduler"):
        load_family(pipeline, torch.float32)


@by_family
def test_targets_that_match_nothing_are_named(kind: str, tmp_path: Path) -> None:
    """Beside the layers that there are."""
    args = RDMConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, guidance_scale=1.0)
    lora = LoraConfig(target_modules=["to_quary"])
    with pytest.raises(ConfigError, match=r"to_quary.*Linear layers of this model: .*\b(to_q|q)\b"):
        RDMTrainer(TINY_PIPELINES[kind](), "dm", args, PROMPTS, peft_config=lora)


def test_a_lora_that_could_not_be_saved_is_refused(tmp_path: Path) -> None:
    """A pipeline without a LoRA loader needs a family that says how; a full copy needs none."""

    class Plain(PixArtFamily):
        save_lora = ModelFamily.save_lora

    args: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "guidance_scale": 1.0}
    words = "PixArtSigmaPipeline has no save_lora_weights.*student_weights='full', or override save_lora.* in Plain"
    with pytest.raises(ModelError, match=words):
        RDMTrainer(Plain(TINY_PIPELINES["PixArtSigmaPipeline"]()), "dm", RDMConfig(**args), PROMPTS)
    full = RDMConfig(**args, student_weights="full")
    RDMTrainer(Plain(TINY_PIPELINES["PixArtSigmaPipeline"]()), "dm", full, PROMPTS)


def test_guidance_that_a_base_does_not_take_is_refused(tmp_path: Path) -> None:
    """A base distilled without guidance has nothing to be guided by."""
    args = RDMConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, guidance_scale=3.0)
    pipeline = TINY_PIPELINES["FluxPipeline"](guidance_embeds=False)
    for _ in range(2):  # the pipeline is as it was, and can be used for another try
        with pytest.raises(ConfigError, match=r"guidance_scale=3\.0: .* was distilled without guidance"):
            RDMTrainer(pipeline, "dm", args, PROMPTS)


def test_a_base_in_float16_is_refused(tmp_path: Path) -> None:
    """Its gradients underflow, and nothing would say so; `fp16=True` is refused for the same reason."""
    pipeline = TINY_PIPELINES["FluxPipeline"]().to(torch.float16)
    for half in ({}, {"bf16": True}):
        args = RDMConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, guidance_scale=3.5, **half)
        with pytest.raises(ConfigError, match=r"is in float16.*torch_dtype=torch\.bfloat16, or torch\.float32"):
            RDMTrainer(pipeline, "dm", args, PROMPTS)
