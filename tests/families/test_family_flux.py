"""FLUX.1 [dev] and [schnell], FLUX.2 [klein] and its base: what the tests of all families do not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from family_asserts import (
    assert_a_trained_student_runs_in_plain_diffusers,
    assert_the_backbone_gets_what_the_pipeline_sends,
)
from peft import LoraConfig
from pipeline_calls import PROMPTS, calls_of, run_pipeline
from tiny_pipelines import tiny_flux, tiny_flux2
from torch import nn
from torch.testing import assert_close

from rdm_sdk import ConfigError, RDMConfig, RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = {"height": 32, "width": 64}
TOKENS = 4 * 8
"""Of an image of `SIZE`."""


def schnell() -> Any:
    return tiny_flux(guidance_embeds=False)


def klein() -> Any:
    pipeline = tiny_flux2()
    pipeline.register_to_config(is_distilled=True)
    return pipeline


PIPELINES = {"dev": tiny_flux, "schnell": schnell, "klein": klein, "klein-base": tiny_flux2}
by_model = pytest.mark.parametrize("model", PIPELINES)


def made(model: str, **options: Any) -> ModelFamily:
    pipeline = PIPELINES[model]()
    pipeline.set_progress_bar_config(disable=True)
    return load_family(pipeline, torch.float32, **options)


def base_sends(family: ModelFamily, **call: Any) -> list[dict[str, Any]]:
    """Return what the base's own pipeline call sends to the backbone."""

    def run() -> None:
        run_pipeline(family.pipeline, PROMPTS, output_type="latent", **SIZE, **call)

    return calls_of(family.pipeline, family.component, run)


@pytest.mark.parametrize("model", ["schnell", "klein"])
def test_bases_without_guidance(model: str, tmp_path: Path) -> None:
    """The variants that the tests of all families leave out pass them too, and refuse a guidance scale."""
    family = made(model)
    assert family.guidance == "none"
    assert_the_backbone_gets_what_the_pipeline_sends(family.pipeline)
    assert_a_trained_student_runs_in_plain_diffusers(PIPELINES[model](), "renoise", tmp_path)
    guided = RDMConfig(output_dir=str(tmp_path), guidance_scale=2.0, use_cpu=True, report_to="none", **SIZE)
    with pytest.raises(ConfigError, match="guidance_scale=2"):
        RDMTrainer(family, "dm", guided, PROMPTS, peft_config=LoraConfig(r=2))


@pytest.mark.parametrize(("model", "num_steps"), [("dev", 4), ("schnell", 4), ("klein", 4), ("klein-base", 50)])
def test_the_default_grid_is_the_bases_own(model: str, num_steps: int) -> None:
    """Its pipeline's at that number of steps, and at every size."""
    family = made(model)
    sent = base_sends(family, num_inference_steps=num_steps, guidance_scale=1.0)
    shape = family.latent_shape(**SIZE)
    own = family.student_sigmas(num_steps, family.base_shift(shape))
    assert_close(torch.tensor(own), torch.stack([call["timestep"][0] for call in sent]), rtol=1e-5, atol=1e-6)
    larger = family.base_shift((shape[0], 128, 128))
    assert (larger == family.base_shift(shape)) is (model == "schnell")


@by_model
def test_half_precision_gets_the_pipelines_times(model: str) -> None:
    """The order of rounding and division is the pipeline's."""
    family = made(model)
    family.pipeline.to(torch.bfloat16)
    sent = base_sends(family, num_inference_steps=20, guidance_scale=1.0)
    condition = family.condition(PROMPTS)
    x_t = torch.randn(2, *family.latent_shape(**SIZE))
    for level, theirs in zip(family.pipeline.scheduler.sigmas[:-1], sent, strict=True):
        (ours,) = calls_of(
            family.pipeline,
            family.component,
            lambda level=level: family.predict(family.roles, TEACHER, x_t, level.expand(2), condition),
        )
        assert torch.equal(ours["timestep"], theirs["timestep"])
        assert {name: value.dtype for name, value in ours.items() if isinstance(value, torch.Tensor)} == {
            name: value.dtype for name, value in theirs.items() if isinstance(value, torch.Tensor)
        }


@by_model
def test_the_student_is_called_as_it_was_trained(model: str) -> None:
    """[dev] is told the run's scale, the others take none; the number of text tokens goes along if it is unusual."""
    scale = 3.5 if model == "dev" else 1.0
    assert made(model).inference_call(4, 3.5) == {"num_inference_steps": 4, "guidance_scale": scale}
    family = made(model, max_sequence_length=64)
    call = family.inference_call(1, 3.5)
    assert call == {"num_inference_steps": 1, "guidance_scale": scale, "max_sequence_length": 64}
    (sent,) = base_sends(family, **call)
    encoded = family.condition(PROMPTS, 3.5)
    assert encoded["encoder_hidden_states"].shape[1] == 64
    for name, tensor in encoded.items():
        assert_close(tensor, sent[name], rtol=1e-5, atol=1e-5)


@by_model
def test_lengths_that_the_family_does_not_take(model: str) -> None:
    """FLUX.1's pipeline refuses more than 512 tokens; FLUX.2's text encoder has places for 4096 here."""
    longest = 512 if model in ("dev", "schnell") else 4096
    pipeline = PIPELINES[model]()
    for length in (0, -1, longest + 1):
        with pytest.raises(ConfigError, match=f"max_sequence_length={length} is not between 1 and {longest}, which"):
            load_family(pipeline, torch.float32, max_sequence_length=length)
    load_family(pipeline, torch.float32, max_sequence_length=longest)


@pytest.mark.parametrize("model", ["dev", "klein"])
@pytest.mark.parametrize("two_streams", [1, 2])
def test_features_are_the_middle_blocks_image_tokens(model: str, two_streams: int) -> None:
    """With more blocks of one stream than of two, as published, the middle one has one stream."""
    family = made(model)
    backbone = family.backbone
    backbone.transformer_blocks = backbone.transformer_blocks[:two_streams]
    middle = backbone.transformer_blocks[1] if two_streams == 2 else backbone.single_transformer_blocks[0]
    seen: list[Any] = []
    middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
    condition = family.condition(PROMPTS)
    x_t, sigma = torch.randn(2, *family.latent_shape(**SIZE)), torch.tensor([0.5, 0.6])
    with torch.no_grad():
        features = family.features(family.roles, TEACHER, condition)(x_t, sigma)
    (output,) = seen
    image = output if isinstance(output, torch.Tensor) else output[1]
    assert features.shape == (2, TOKENS, family.feature_width)
    assert torch.equal(features, image[:, -TOKENS:])


@pytest.mark.parametrize("model", ["dev", "schnell", "klein"])
def test_adapters_are_on_every_layer(model: str) -> None:
    """Blocks of one stream and of two, whose layers share names: a proj_out, or a list of layers called attn.to_out."""
    family = made(model)
    linear = {name for name, module in family.backbone.named_modules() if type(module) is nn.Linear}
    family.roles.add_role("student", LoraConfig(r=2, target_modules=list(family.lora_targets)))
    adapted = {name.rsplit(".lora_A", 1)[0] for name in family.roles.parameters_of("student") if ".lora_A" in name}
    assert adapted == linear


def test_whitening_takes_the_vaes_epsilon() -> None:
    """A channel that never varied is not blown up: its deviation is the square root of the epsilon."""
    family = made("klein")
    family.pipeline.vae.bn.running_var.zero_()
    family.pipeline.vae.bn.running_mean.zero_()
    latents = torch.randn(2, *family.latent_shape(**SIZE))
    assert_close(family.to_vae(latents), latents * family.pipeline.vae.config.batch_norm_eps**0.5)


def test_the_published_form_of_latents() -> None:
    """What FLUX.2's call takes as latents is what it would have made of the VAE's."""
    family = made("klein")
    latents = torch.randn(2, *family.latent_shape(**SIZE))
    assert torch.equal(family.pack(latents), family.pipeline._patchify_latents(latents))
    with pytest.raises(ConfigError, match="positive multiples of 8"):
        family.latent_shape(36, 64)


def test_no_prompt_is_the_negative_prompt_of_the_call() -> None:
    """FLUX.2's base is guided away from the empty text."""
    family = made("klein-base")
    sent = base_sends(family, num_inference_steps=1, guidance_scale=2.0)
    assert len(sent) == 2
    assert_close(
        family.condition([None, None])["encoder_hidden_states"], sent[1]["encoder_hidden_states"], rtol=1e-5, atol=1e-5
    )


def test_variants_are_recognized_after_loading(tmp_path: Path) -> None:
    """From what the pipeline's files say."""
    for model, guidance in [
        ("dev", "embedded"),
        ("schnell", "none"),
        ("klein", "none"),
        ("klein-base", "classifier-free"),
    ]:
        PIPELINES[model]().save_pretrained(tmp_path / model)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / model)
        assert load_family(pipeline, torch.float32).guidance == guidance
