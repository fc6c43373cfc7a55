"""Every family: the backbone gets what its own pipeline sends, and a trained student runs in plain diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from peft import LoraConfig
from torch import Tensor

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer
from rdm_sdk.models.base import ModelAdapter
from rdm_sdk.models.load import ADAPTERS, load_adapter
from rdm_sdk.models.roles import TEACHER
from rdm_sdk.testing.pipelines import TINY_PIPELINES

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FAMILIES = sorted(ADAPTERS)
PROMPTS = ["a red fox", "two boats"]
by_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Return a tiny pipeline of every family; tests leave them as they are."""
    made = {name: TINY_PIPELINES[name]() for name in FAMILIES}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def size_of(adapter: ModelAdapter) -> dict[str, int]:
    """Return a size that is not square, so that height and width cannot be mixed up."""
    _, height, width = adapter.latent_shape(None, None)
    factor = adapter.pipeline.vae_scale_factor
    return {"height": height * factor, "width": 2 * width * factor}


def calls_of(pipeline: Any, component: str, run: Any) -> list[dict[str, Any]]:
    """Return the named arguments of every call of a backbone while `run()` runs, without those that are None."""
    backbone, seen = getattr(pipeline, component), []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        seen.append({k: v for k, v in bound.items() if v is not None and k not in ("self", "return_dict")})

    handle = backbone.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen


def assert_same_inputs(ours: Any, theirs: Any, name: str = "") -> None:
    """Value for value: tensors after broadcasting to our batch, mappings by key."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            assert_same_inputs(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(theirs, Tensor):
        wanted = theirs.to(ours.dtype)
        assert torch.equal(ours, wanted.expand_as(ours) if wanted.ndim == 0 else wanted), name
    else:
        assert ours == theirs, name


@by_family
def test_the_backbone_gets_what_the_pipeline_sends(family: str, pipelines: dict[str, Any]) -> None:
    """At both guidance branches and every step, our keyword arguments equal the pipeline call's, value for value."""
    pipeline = pipelines[family]
    adapter = load_adapter(pipeline, torch.float32)
    size = size_of(adapter)
    torch.manual_seed(0)
    shape = adapter.latent_shape(**size)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": torch.randn(2, *shape), "output_type": "latent"}
    theirs = calls_of(pipeline, adapter.component, lambda: pipeline(PROMPTS, **call, **size))
    assert len(theirs) >= 2
    both = [adapter.encode_prompts([""] * 2), adapter.encode_prompts(PROMPTS)]
    condition = {name: torch.cat([half[name] for half in both]) for name in both[0]}
    known = adapter.student_sigmas(1, None)  # the family's highest level is on both grids
    assert 0 < known[0] <= 1
    for call in theirs:
        x_t = call.get("sample", call.get("hidden_states"))
        sigma = level_of(adapter, call["timestep"]).expand(4)
        (ours,) = calls_of(
            pipeline,
            adapter.component,
            lambda x_t=x_t, sigma=sigma: adapter.predict(adapter.roles, TEACHER, x_t, sigma, condition),
        )
        assert_same_inputs(ours, call)


def level_of(adapter: ModelAdapter, timestep: Tensor) -> Tensor:
    """Return the noise level of a pipeline's timestep."""
    timestep = timestep.flatten()[:1]
    if hasattr(adapter, "train_sigmas"):
        return adapter.train_sigmas[timestep.long()]
    return timestep / adapter.pipeline.scheduler.config.num_train_timesteps


@by_family
def test_predictions_convert_as_the_familys_scheduler_does(family: str, pipelines: dict[str, Any]) -> None:
    """Our x_0 is the pipeline's own scheduler's, step by step of its grid."""
    pipeline = pipelines[family]
    adapter = load_adapter(pipeline, torch.float32)
    shape = adapter.latent_shape(None, None)
    condition = adapter.encode_prompts(PROMPTS)
    scheduler = adapter.student_scheduler(4, None, stochastic=False)
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    x_t = torch.randn(2, *shape)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            sigma = level_of(adapter, timestep).expand(2)
            prediction = adapter.predict(adapter.roles, TEACHER, x_t, sigma, condition)
            ours = adapter.denoiser(adapter.roles, TEACHER, condition)(x_t, sigma)
            stepped = scheduler.step(prediction, timestep, x_t)
            if hasattr(stepped, "pred_original_sample"):
                theirs = stepped.pred_original_sample
            else:  # flow matching: follow the straight line to its end
                theirs = x_t - scheduler.sigmas[step] * prediction
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            x_t = stepped.prev_sample


@by_family
@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_a_trained_student_runs_in_plain_diffusers(family: str, sampler: str, tmp_path: Path) -> None:
    """Ten steps move the student and leave the teacher bit for bit; export and plain pipeline give our own images."""
    pipeline = TINY_PIPELINES[family]()
    pipeline.save_pretrained(tmp_path / "base")
    adapter = load_adapter(str(tmp_path / "base"), torch.float32)
    size = size_of(adapter)
    args = RDMConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=10,
        per_device_train_batch_size=4,
        num_generations=4,
        critic_steps=1,
        learning_rate=1e-2,
        sampler=sampler,
        guidance_scale=2.0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        **size,
    )
    trainer = RDMTrainer(adapter, "dm", args, PROMPTS, peft_config=LoraConfig(r=4, lora_alpha=12))
    probe = torch.randn(2, *adapter.latent_shape(**size), generator=torch.Generator().manual_seed(3))
    condition, sigma = adapter.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3])

    def teacher_says() -> Tensor:
        with torch.no_grad():
            return adapter.denoiser(adapter.roles, TEACHER, condition)(probe, sigma)

    before = teacher_says()
    trainer.train()
    assert torch.equal(teacher_says(), before)
    torch.manual_seed(5)
    ours = trainer.sample(PROMPTS, noise=probe)
    trainer.save_model(str(tmp_path / "student"))

    plain = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain.set_progress_bar_config(disable=True)
    scheduler = adapter.student_scheduler(4, None, stochastic=sampler == "renoise")
    plain.scheduler = type(scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")

    def images() -> Tensor:
        torch.manual_seed(5)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
        return plain(PROMPTS, latents=probe.clone(), **size, **call).images

    without = images()
    plain.load_lora_weights(tmp_path / "student")
    theirs = images()
    assert (theirs - ours).abs().max() < 1e-4
    assert (without - ours).abs().max() > 1e-3


@by_family
def test_decoding_gives_the_pipelines_pictures(family: str) -> None:
    """The pipeline's own latents decode to the pipeline's own images; SDXL with statistics of its channels too."""
    variants: list[dict[str, list[float]]] = [{}]
    if family == "StableDiffusionXLPipeline":
        variants.append({"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.5, 0.7, 1.2, 0.9]})
    for statistics in variants:
        pipeline = TINY_PIPELINES[family]()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.register_to_config(**statistics)
        adapter = load_adapter(pipeline, torch.float32)
        size = size_of(adapter)
        call = {"num_inference_steps": 2, "latents": torch.randn(2, *adapter.latent_shape(**size)), **size}
        with torch.no_grad():
            latents = pipeline(PROMPTS, output_type="latent", **call).images
            theirs = pipeline(PROMPTS, output_type="pt", **call).images
            torch.testing.assert_close(adapter.decode(latents), theirs, rtol=0, atol=1e-5)
            again = adapter.encode_images(theirs)
            raw = pipeline.vae.encode(theirs * 2 - 1).latent_dist.mode()
            undone = adapter._unscaled(again) if statistics else raw
            torch.testing.assert_close(undone, raw, rtol=1e-4, atol=1e-5)


@by_family
def test_encoding_inverts_decoding_s_normalization(family: str, pipelines: dict[str, Any]) -> None:
    """A latent's place relative to the VAE's own: what decode undoes, encode_images does."""
    adapter = load_adapter(pipelines[family], torch.float32)
    vae = adapter.pipeline.vae
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = vae.encode(images * 2 - 1).latent_dist.mode()
        wanted = (vae.decode(raw, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(adapter.decode(adapter.encode_images(images)), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapter.encode_images(images), raw)


@by_family
def test_features_come_in_tokens(family: str, pipelines: dict[str, Any]) -> None:
    """What heads read is [N, tokens, feature_width] and differentiable in x_t."""
    adapter = load_adapter(pipelines[family], torch.float32)
    x_t = torch.randn(2, *adapter.latent_shape(None, None), requires_grad=True)
    features = adapter.features(adapter.roles, TEACHER, adapter.encode_prompts(PROMPTS))(x_t, torch.tensor([0.5, 0.6]))
    assert features.ndim == 3
    assert features.shape[::2] == (2, adapter.feature_width)
    features.sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.any()


# ---- Stable Diffusion and SDXL ----------------------------------------------------------------------------------


def test_v_prediction_is_recognized() -> None:
    """Stable Diffusion 2's prediction is read from its scheduler."""
    assert load_adapter(TINY_PIPELINES["StableDiffusionPipeline"](), torch.float32).prediction == "eps"
    pipeline = TINY_PIPELINES["StableDiffusionPipeline"](prediction_type="v_prediction")
    assert load_adapter(pipeline, torch.float32).prediction == "v"


def test_the_student_keeps_the_bases_training_steps() -> None:
    """Betas and their rescaling to zero terminal signal go into the student's schedulers."""
    pipeline = TINY_PIPELINES["StableDiffusionPipeline"](prediction_type="v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    adapter = load_adapter(pipeline, torch.float32)
    for stochastic in (True, False):
        scheduler = adapter.student_scheduler(4, None, stochastic)
        assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
        assert scheduler.config.prediction_type == "v_prediction"


def test_timesteps_of_noise_levels(pipelines: dict[str, Any]) -> None:
    """Integers on the training steps, rising in between, held at both ends."""
    adapter = load_adapter(pipelines["StableDiffusionPipeline"], torch.float32)
    assert torch.equal(adapter.timesteps(adapter.train_sigmas), torch.arange(1000.0))
    between = adapter.timesteps((adapter.train_sigmas[:-1] + adapter.train_sigmas[1:]) / 2)
    assert ((between > torch.arange(999.0)) & (between < torch.arange(1.0, 1000.0))).all()
    assert adapter.timesteps(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


def test_an_empty_sdxl_prompt_is_the_pipelines_missing_negative_prompt(pipelines: dict[str, Any]) -> None:
    """Zeros, as the base was trained; other prompts beside it are untouched."""
    adapter = load_adapter(pipelines["StableDiffusionXLPipeline"], torch.float32)
    condition = adapter.encode_prompts(["", "a fox"])
    for tensor in condition.values():
        assert not tensor[0].any()
        assert tensor[1].any()


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_bad_input_is_refused(family: str, pipelines: dict[str, Any]) -> None:
    """Sizes, shifts, grids and token counts that the family does not have, and schedulers it cannot follow."""
    adapter = load_adapter(pipelines[family], torch.float32)
    with pytest.raises(ConfigError, match=r"multiples of \d+; got 33 x 64"):
        adapter.latent_shape(33, 64)
    with pytest.raises(ConfigError, match=r"shift=3\.0 is for rectified flows"):
        adapter.student_scheduler(4, 3.0)
    with pytest.raises(ConfigError, match="num_inference_steps=3 does not divide the 1000 training steps"):
        adapter.student_sigmas(3, None)
    with pytest.raises(ConfigError, match="whose number of tokens is fixed"):
        load_adapter(pipelines[family], torch.float32, max_sequence_length=64)
    other = TINY_PIPELINES[family]()
    other.scheduler = PNDMScheduler.from_config(other.scheduler.config, prediction_type="flow")
    with pytest.raises(ModelError, match="got PNDMScheduler with prediction_type='flow'"):
        load_adapter(other, torch.float32)


def test_the_deterministic_grid_is_the_stochastic_one(pipelines: dict[str, Any]) -> None:
    """LCM's grid and DDIM's are one, for every number of steps that is let through."""
    adapter = load_adapter(pipelines["StableDiffusionPipeline"], torch.float32)
    for num_steps in (1, 2, 4, 5, 8):
        grids = []
        for stochastic in (True, False):
            scheduler = adapter.student_scheduler(num_steps, None, stochastic)
            scheduler.set_timesteps(num_steps)
            grids.append(scheduler.timesteps.tolist())
        assert grids[0] == grids[1]
        assert grids[0][0] == 999
    assert isinstance(adapter.student_scheduler(4, None, stochastic=False), DDIMScheduler)
