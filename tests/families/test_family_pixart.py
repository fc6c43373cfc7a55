"""PixArt-Sigma: its steps, its PEFT-only students, and what Sana's pipeline has from PixArt's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma
from peft import LoraConfig
from pipeline_calls import calls_of
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.method.noise import VariancePreservingSchedule
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, load_student, save_student

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
both = pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "SanaPipeline"])


def pixart(**transformer: Any) -> Any:
    """Return a tiny pipeline, with another transformer if anything is said of it."""
    pipeline = TINY_PIPELINES["PixArtSigmaPipeline"]()
    if transformer:
        config = dict(pipeline.transformer.config) | transformer
        pipeline.register_modules(transformer=PixArtTransformer2DModel.from_config(config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs_of(pipeline: Any, run: Any) -> dict[str, Any]:
    """Return the named arguments of the transformer's first call while `run()` runs."""
    return calls_of(pipeline, "transformer", run)[0]


def with_a_student(family: ModelFamily) -> ModelFamily:
    """Give a family a student that is not the teacher, its alpha other than its rank."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(family.lora_targets), init_lora_weights=False)
    family.roles.add_role(STUDENT, config)
    return family


def info(stochastic: bool = True, height: int | None = None, width: int | None = None) -> StudentInfo:
    """Return what an export of two steps says."""
    return StudentInfo(2, None, stochastic, 1.0, resolve_rewards("dm"), {}, [(height, width)])


# ---- Steps ------------------------------------------------------------------------------------------------------


def test_timesteps_and_signal_of_every_training_step() -> None:
    """The last ones lie a few float32 apart, and sigma alone would give their alpha only to a thousandth."""
    family: Any = load_family(pixart(), torch.float32)
    assert torch.equal(family.timesteps(family.train_sigmas), torch.arange(1000.0))
    kept = family.pipeline.scheduler.alphas_cumprod.double().sqrt()
    plain = VariancePreservingSchedule().alpha(family.train_sigmas)
    assert (plain / kept - 1).abs().max() > 1e-4
    column = family.train_sigmas.reshape(10, 100, 1)
    torch.testing.assert_close(family.schedule.alpha(column).flatten().double(), kept, rtol=1e-7, atol=0)
    between = torch.tensor([0.0, 0.001, 0.5, 0.98, 1.0])
    assert torch.equal(family.schedule.alpha(between), VariancePreservingSchedule().alpha(between))
    assert family.schedule.alpha(between.double()).dtype == torch.float64


def test_between_training_steps_the_transformer_is_told_fractions() -> None:
    """Its time embedding takes any number; one that is rounded would belong to another noise level."""
    family: Any = load_family(pixart(), torch.float32)
    sigma = family.train_sigmas[[100, 500]] * 0.5 + family.train_sigmas[[101, 501]] * 0.5
    x_t, condition = torch.randn(2, *family.latent_shape(32, 32)), family.condition(["a", "b"])
    inputs = inputs_of(family.pipeline, lambda: family.predict(family.roles, TEACHER, x_t, sigma, condition))
    torch.testing.assert_close(inputs["timestep"], torch.tensor([100.5, 500.5]), rtol=0, atol=0.01)


def test_other_schedulers() -> None:
    """Any scheduler of a DDPM can be followed, with its own betas; DPM-Solver's flows cannot."""
    pipeline = pixart()
    pipeline.scheduler = DDPMScheduler(beta_start=0.001, beta_end=0.02, prediction_type="v_prediction")
    family: Any = load_family(pipeline, torch.float32)
    assert family.prediction == "v"
    for stochastic in (True, False):
        assert torch.equal(family.student_scheduler(4, None, stochastic).betas, pipeline.scheduler.betas)
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ModelError, match="got DPMSolverMultistepScheduler with prediction_type='flow_prediction'"):
        load_family(pipeline, torch.float32)


# ---- Transformers -----------------------------------------------------------------------------------------------


def test_the_published_transformer_of_1024_pixels() -> None:
    """Of sample size 128 and not told sizes: the pipeline's own inputs."""
    pipeline = pixart(sample_size=128, use_additional_conditions=False)
    family = load_family(pipeline, torch.float32)
    assert family.default_size == (512, 512)  # the tiny VAE makes latents of a quarter, not an eighth
    latents = torch.randn(1, *family.latent_shape(32, 64))
    call = family.inference_call(2) | {"height": 32, "width": 64, "latents": latents, "output_type": "latent"}
    pipeline.scheduler = family.student_scheduler(2, None)
    theirs = inputs_of(pipeline, lambda: pipeline("a fox", **call))
    assert theirs["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}
    sigma = torch.tensor(family.student_sigmas(2, None)[:1])
    condition = family.condition(["a fox"])
    ours = inputs_of(pipeline, lambda: family.predict(family.roles, TEACHER, latents, sigma, condition))
    assert ours["added_cond_kwargs"] == theirs["added_cond_kwargs"]
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("told", [True, None])
def test_a_transformer_that_is_told_sizes_is_refused(told: bool | None) -> None:
    """The pipeline itself cannot run one; at sample size 128, None means yes."""
    pipeline = pixart(sample_size=128, use_additional_conditions=told, num_attention_heads=3)
    with pytest.raises(AttributeError):
        pipeline("a fox", num_inference_steps=1, height=32, width=32, use_resolution_binning=False, clean_caption=False)
    with pytest.raises(ModelError, match="use_additional_conditions, which PixArtSigmaPipeline itself cannot run"):
        load_family(pipeline, torch.float32)


def test_a_transformer_without_variance() -> None:
    """One that predicts the noise alone is used as a whole."""
    family = load_family(pixart(out_channels=4), torch.float32)
    x_t = torch.randn(2, *family.latent_shape(32, 64))
    prediction = family.predict(family.roles, TEACHER, x_t, torch.tensor([0.5, 0.6]), family.condition(["a", "b"]))
    assert prediction.shape == x_t.shape


# ---- Captions ---------------------------------------------------------------------------------------------------


def test_captions_are_cleaned_neither_in_training_nor_in_the_students_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the packages are installed with which the pipeline call cleans them by default."""
    pipeline = pixart()
    family = load_family(pipeline, torch.float32)
    before = family.encode_prompts(["A <b>fox</b>"])
    for package in ("bs4", "ftfy"):
        monkeypatch.setattr(pipeline_pixart_sigma, f"is_{package}_available", lambda: True)
    monkeypatch.setattr(type(pipeline), "_clean_caption", lambda self, caption: "cleaned")
    call = {"height": 32, "width": 32, "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 1.0}

    def said(**options: Any) -> Tensor:
        run = {**call, **options}
        inputs = inputs_of(pipeline, lambda: pipeline("A <b>fox</b>", **run))
        return inputs["encoder_hidden_states"]

    embeds = before["encoder_hidden_states"]
    assert not torch.allclose(said(use_resolution_binning=False), embeds, atol=1e-3)
    assert torch.equal(said(**family.inference_call(1)), embeds)
    assert torch.equal(family.encode_prompts(["A <b>fox</b>"])["encoder_hidden_states"], embeds)


# ---- Students in plain PEFT -------------------------------------------------------------------------------------


def test_a_student_is_loaded_by_peft_alone(tmp_path: Path) -> None:
    """No file that looks like diffusers' is written; the transformer is changed in place, alpha and all."""
    family = with_a_student(load_family(pixart(), torch.float32))
    save_student(tmp_path, family, info())
    assert not list(tmp_path.glob("*.safetensors"))
    plain = pixart()
    transformer = plain.transformer
    load_student(plain, tmp_path)
    assert plain.transformer is transformer
    assert type(transformer) is PixArtTransformer2DModel
    x_t, sigma = torch.randn(1, *family.latent_shape(32, 32)), torch.tensor([0.5])
    condition = family.condition(["a fox"])
    inputs = inputs_of(family.pipeline, lambda: family.predict(family.roles, TEACHER, x_t, sigma, condition))
    with torch.no_grad():
        theirs = transformer(**inputs)[0]
        assert torch.equal(theirs, family.roles(STUDENT, **inputs))
        assert not torch.allclose(theirs, family.backbone(**inputs)[0], atol=1e-2)


def test_diffusers_own_file_comes_first(tmp_path: Path) -> None:
    """A pipeline with a loader needs no `peft/`, and knows afterwards what it has loaded."""
    family = with_a_student(load_family(TINY_PIPELINES["SanaPipeline"](), torch.float32))
    save_student(tmp_path, family, info())
    shutil.rmtree(tmp_path / "peft")
    plain = TINY_PIPELINES["SanaPipeline"]()
    load_student(plain, tmp_path)
    assert len(plain.get_active_adapters()) == 1


def test_no_student_is_an_error(tmp_path: Path) -> None:
    """An empty folder, and one with a file that the pipeline cannot load, hold none."""
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="there is no student for a PixArtSigmaPipeline in"):
        load_student(pixart(), tmp_path)
    with pytest.raises(ModelError, match="there is no student for a SanaPipeline in"):
        load_student(TINY_PIPELINES["SanaPipeline"](), tmp_path / "nothing")


# ---- What PixArt and Sana share ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_model_cards_code_samples_the_student(kind: str, stochastic: bool, tmp_path: Path) -> None:
    """As written, with the scheduler's own class, and in the run's size: not that of the pipeline's call."""
    TINY_PIPELINES[kind]().save_pretrained(tmp_path / "base")
    family = with_a_student(load_family(str(tmp_path / "base"), torch.float32))
    save_student(tmp_path / "student", family, info(stochastic, height=32, width=64))
    code = (tmp_path / "student" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert ("load_lora_weights" in code) == (kind == "SanaPipeline")
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "student")), names)
    assert names["image"].size == (64, 32)
    pipe = names["pipe"]
    scheduler = family.student_scheduler(2, None, stochastic)
    assert type(pipe.scheduler) is type(scheduler)
    family.set_grid(scheduler, 2)
    assert torch.equal(pipe.scheduler.timesteps, scheduler.timesteps)
    x_t, sigma = torch.randn(1, *family.latent_shape(32, 32)), torch.tensor([0.5])
    inputs = inputs_of(
        family.pipeline, lambda: family.predict(family.roles, STUDENT, x_t, sigma, family.condition(["a fox"]))
    )
    with torch.no_grad():
        expected = family.roles(STUDENT, **inputs)
        torch.testing.assert_close(pipe.transformer(**inputs)[0], expected)


@both
def test_the_card_names_the_bases_size_where_the_run_has_none(kind: str, tmp_path: Path) -> None:
    """Sana's call would make 1,024 pixels of whatever base."""
    family = with_a_student(load_family(TINY_PIPELINES[kind](), torch.float32))
    save_student(tmp_path, family, info())
    height, width = family.default_size
    assert f"use_resolution_binning=False, height={height}, width={width})" in (
        (tmp_path / "README.md").read_text(encoding="utf-8").replace("clean_caption=False, ", "")
    )


def _answer(output: Tensor, *_: Any, **__: Any) -> Tensor:
    return output


@both
def test_the_variance_is_the_second_half(kind: str) -> None:
    """It is left out; a network that predicts none is heard whole."""
    family: Any = load_family(TINY_PIPELINES[kind](), torch.float32)
    mean = torch.randn(2, family.latent_channels, 4, 4)
    condition = family.encode_prompts(["a fox", "a crow"])
    for output in (torch.cat([mean, mean + 1], dim=1), mean):
        network = partial(_answer, output)
        assert torch.equal(family.predict_at(network, STUDENT, mean, torch.ones(2), condition), mean)


@both
def test_sizes(kind: str) -> None:
    """Multiples of what the call takes, the VAE shrinks and the patches need; the default is the transformer's."""
    pipeline = TINY_PIPELINES[kind]()
    family = load_family(pipeline, torch.float32)
    unit, default = {"PixArtSigmaPipeline": (8, 128), "SanaPipeline": (32, 128)}[kind]
    assert family.size_unit == unit
    assert family.default_size == (default, default)
    with pytest.raises(ValueError, match=f"divisible by {unit}"):
        pipeline("a fox", height=unit // 2, width=unit, use_resolution_binning=False)
    with pytest.raises(ConfigError, match=f"positive multiples of {unit} for"):
        family.latent_shape(unit // 2, unit)
    pipeline.transformer.register_to_config(patch_size=16)
    assert family.size_unit == 16 * pipeline.vae_scale_factor
    pipeline.transformer.register_to_config(patch_size=1)
    assert family.size_unit == unit


@both
def test_the_layers_that_are_adapted(kind: str) -> None:
    """Embedders, modulation, attention, feed-forwards and what leads in and out; not Sana's depthwise convolutions."""
    family = with_a_student(load_family(TINY_PIPELINES[kind](), torch.float32))
    names = {name.split(".lora_")[0] for name in family.roles.role_state_dict(STUDENT)}
    into, time, feed_forward = {
        "PixArtSigmaPipeline": ("pos_embed.proj", "adaln_single", ("ff.net.0.proj", "ff.net.2")),
        "SanaPipeline": ("patch_embed.proj", "time_embed", ("ff.conv_inverted", "ff.conv_point")),
    }[kind]
    attention = [f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    embedders = (f"{time}.emb.timestep_embedder", "caption_projection")
    assert names == {
        *(f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in (*attention, *feed_forward)),
        *(f"{embedder}.{layer}" for embedder in embedders for layer in ("linear_1", "linear_2")),
        *(into, f"{time}.linear", "proj_out"),
    }


@both
def test_the_number_of_tokens(kind: str) -> None:
    """It is the pipeline's, reaches the student's call, and must leave a token to the prompt."""
    pipeline = TINY_PIPELINES[kind]()
    besides = {"PixArtSigmaPipeline": 1, "SanaPipeline": 2}[kind]
    default = load_family(pipeline, torch.float32)
    assert default.encode_prompts(["a fox"])["encoder_hidden_states"].shape[1] == 300
    assert "max_sequence_length" not in default.inference_call(4)
    shortest = load_family(pipeline, torch.float32, max_sequence_length=besides + 1)
    assert shortest.inference_call(4)["max_sequence_length"] == besides + 1
    condition = shortest.condition(["x", "y", None])
    mask = condition["encoder_attention_mask"]
    assert condition["encoder_hidden_states"].shape[:2] == mask.shape == (3, besides + 1)
    assert mask[:2].all()
    # T5's tokens here are single letters, and the first is the space in front of a word.
    words = load_family(pipeline, torch.float32, max_sequence_length=besides + 2).condition(["x", "y"])
    assert not torch.allclose(*words["encoder_hidden_states"], atol=1e-3)
    for count in (besides, 0, -1):
        with pytest.raises(ConfigError, match=f"max_sequence_length={count} leaves no token to a prompt"):
            load_family(pipeline, torch.float32, max_sequence_length=count)


@both
def test_a_student_of_fewer_tokens_is_told_what_it_was_trained_with(kind: str, tmp_path: Path) -> None:
    """The student's plain call encodes prompts as the family does."""
    pipeline = TINY_PIPELINES[kind]()
    pipeline.set_progress_bar_config(disable=True)
    family = load_family(pipeline, torch.float32, max_sequence_length=7)
    pipeline.scheduler = family.student_scheduler(1, None)
    call = family.inference_call(1) | {"height": 32, "width": 32, "output_type": "latent"}
    theirs = inputs_of(pipeline, lambda: pipeline("a red fox", **call))
    ours = family.condition(["a red fox"])
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


@both
def test_what_plans_and_heads_go_by(kind: str) -> None:
    """Shapes of encodings without encoding, and features from the middle block: of two, the first."""
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    example, encoded = family.example_encoding(2), family.encode_prompts(["a fox", "two boats"])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in example.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in encoded.items()
    }
    assert example["encoder_attention_mask"].all()
    assert family.feature_block() is family.backbone.transformer_blocks[0]
