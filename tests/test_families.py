"""Every family: the backbone gets what its own pipeline sends, and a trained student runs in plain diffusers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.flow import unpack
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.training.export import load_student

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FAMILIES = sorted(TINY_PIPELINES)
PROMPTS = ["a red fox", "two boats on a lake"]  # of two lengths, so that masks matter
by_family = pytest.mark.parametrize("kind", FAMILIES)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Return a tiny pipeline of every family; tests leave them as they are."""
    made = {name: TINY_PIPELINES[name]() for name in FAMILIES}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


GUIDED: dict[str, dict[str, Any]] = {
    # How each pipeline call is made to guide by 3 in our terms; the others take guidance_scale=3.
    "QwenImagePipeline": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "ZImagePipeline": {"guidance_scale": 2.0},
}
CALL: dict[str, dict[str, Any]] = {
    "SanaPipeline": {"use_resolution_binning": False},
    "PixArtSigmaPipeline": {"use_resolution_binning": False, "clean_caption": False},
}
"""What a family's pipeline call needs to be told besides."""


def size_of(family: ModelFamily) -> dict[str, int]:
    """Return a small size that is not square, so that height and width cannot be mixed up."""
    unit = family.size_unit
    height = -(-32 // unit) * unit
    return {"height": height, "width": 2 * height}


def run_pipeline(pipeline: Any, prompts: list[str], **call: Any) -> Any:
    """Return the images (or latents) of a plain pipeline call."""
    return pipeline(prompt=list(prompts), **{**CALL.get(type(pipeline).__name__, {}), **call}).images


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
    """Value for value, in kinds, shapes and float32 numbers; the encoders' last bits depend on the batch.

    A single number stands for one per sample.
    """
    assert type(ours) is type(theirs), name
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            assert_same_inputs(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), name
        for place, (own, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_inputs(own, their, f"{name}[{place}]")
    elif isinstance(theirs, Tensor):
        wanted = theirs.to(ours.dtype) if theirs.ndim == 0 or name == ".timestep" else theirs
        wanted = wanted.expand_as(ours) if theirs.ndim == 0 else wanted
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6, msg=lambda said: f"{name}: {said}")
    else:
        assert ours == theirs, name


@by_family
def test_the_backbone_gets_what_the_pipeline_sends(kind: str, pipelines: dict[str, Any]) -> None:
    """At both guidance branches and every step, our keyword arguments equal the pipeline call's, value for value."""
    pipeline = pipelines[kind]
    family = load_family(pipeline, torch.float32)
    size = size_of(family)
    latents = torch.randn(2, *family.latent_shape(**size), generator=torch.Generator().manual_seed(0))
    guided = GUIDED.get(kind, {"guidance_scale": 3.0})
    theirs = calls_of(
        pipeline,
        family.component,
        lambda: run_pipeline(
            pipeline,
            PROMPTS,
            num_inference_steps=2,
            latents=family.pack(latents),
            output_type="latent",
            **size,
            **guided,
        ),
    )
    with_prompt, without = family.condition(PROMPTS, 3.0), family.condition([None, None], 3.0)
    # A pipeline runs both branches in one pass, prompts first or last, or in two, prompts first.
    for position, call in enumerate(theirs):
        count = batch_of(call)
        assert count in (2, 4)
        assert len(theirs) == (4 if count == 2 and family.guidance == "classifier-free" else 2)
        branches = [with_prompt, without]
        if count == 2:
            condition = branches[position % 2 if len(theirs) == 4 else 0]
        else:
            order = branches if kind == "ZImagePipeline" else branches[::-1]
            condition = {name: torch.cat([half[name] for half in order]) for name in with_prompt}
        x_t, sigma = state_of(family, call, size)
        (ours,) = calls_of(
            pipeline,
            family.component,
            lambda x_t=x_t, sigma=sigma, condition=condition: family.predict(
                family.roles, TEACHER, x_t, sigma, condition
            ),
        )
        assert_same_inputs(ours, call)


def batch_of(call: dict[str, Any]) -> int:
    """Return how many samples a backbone's call is for."""
    state = call.get("sample", call.get("hidden_states", call.get("x")))
    return len(state)


def state_of(family: ModelFamily, call: dict[str, Any], size: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return what a backbone's call says of x_t `[N, C, h, w]` and its noise levels `[N]`."""
    state = call.get("sample", call.get("hidden_states", call.get("x")))
    if isinstance(state, list):  # Z-Image: [C, 1, h, w] each, and time runs the other way
        return torch.stack(state)[:, :, 0], 1 - call["t"].float()
    _, height, width = family.latent_shape(**size)
    x_t = state if state.ndim == 4 else unpack(state, height, width)
    timestep = (
        call["timestep"].flatten().float().expand(len(x_t)) if call["timestep"].numel() == 1 else call["timestep"]
    )
    scale = 1.0 if state.ndim == 3 else 1000.0  # packed families divide the time by 1000 themselves
    return x_t, level_of(family, timestep * 1000.0 / scale)


def level_of(family: ModelFamily, timestep: Tensor) -> Tensor:
    """Return the noise levels of timesteps on the scheduler's scale."""
    if hasattr(family, "train_sigmas"):
        return family.train_sigmas[timestep.long()]
    return timestep / family.pipeline.scheduler.config.num_train_timesteps


@by_family
@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_a_trained_student_runs_in_plain_diffusers(kind: str, sampler: str, tmp_path: Path) -> None:
    """Ten steps move the student and leave the teacher bit for bit; export and plain pipeline give our own images."""
    pipeline = TINY_PIPELINES[kind]()
    pipeline.save_pretrained(tmp_path / "base")
    family = load_family(str(tmp_path / "base"), torch.float32)
    size = size_of(family)
    args = RDMConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=10,
        per_device_train_batch_size=4,
        num_generations=4,
        critic_steps=1,
        learning_rate=1e-2,
        sampler=sampler,
        guidance_scale=1.0 if family.guidance == "none" else 2.0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        **size,
    )
    trainer = RDMTrainer(family, "dm", args, PROMPTS, peft_config=LoraConfig(r=4, lora_alpha=12))
    probe = torch.randn(2, *family.latent_shape(**size), generator=torch.Generator().manual_seed(3))
    condition, sigma = family.condition(PROMPTS), torch.tensor([0.7, 0.3])

    def teacher_says() -> Tensor:
        with torch.no_grad():
            return family.denoiser(family.roles, TEACHER, condition)(probe, sigma)

    before = teacher_says()
    trainer.train()
    assert torch.equal(teacher_says(), before)
    torch.manual_seed(5)
    ours = trainer.sample(PROMPTS, noise=probe)
    trainer.save_model(str(tmp_path / "student"))

    plain = DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain.set_progress_bar_config(disable=True)
    scheduler = family.student_scheduler(4, trainer.models.shift, stochastic=sampler == "renoise")
    plain.scheduler = type(scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")
    call = family.inference_call(4, args.guidance_scale) | size

    def images(**call: Any) -> Tensor:
        torch.manual_seed(5)
        with noise_in_our_shape(family, probe):
            latents = family.pack(probe.clone())
            return run_pipeline(plain, PROMPTS, latents=latents, output_type="pt", **call)

    without = images(**call)
    theirs = images(**load_student(plain, tmp_path / "student"))
    assert (theirs - ours).abs().max() < 1e-4
    assert (without - ours).abs().max() > 1e-3
    if sampler == "ode":
        assert image_of_the_card(tmp_path / "student").size == (size["width"], size["height"])


def image_of_the_card(folder: Path) -> Any:
    """Run the code of a student's model card, and return the image that it makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names["image"]


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


def in_the_loop(family: ModelFamily, latents: Tensor) -> Tensor:
    """Return latents as the pipeline's scheduler sees them: FLUX.2 packs what it is given once more."""
    packed = family.pack(latents)
    return packed.flatten(2).transpose(1, 2) if type(family.pipeline).__name__ == "Flux2KleinPipeline" else packed


@contextmanager
def noise_in_our_shape(family: ModelFamily, like: Tensor) -> Iterator[None]:
    """Let the scheduler draw its noise as latents `[N, C, h, w]`, as our sampler does, and pack it."""
    modules = [scheduling_flow_match_euler_discrete, scheduling_lcm]
    before = [module.randn_tensor for module in modules]

    def draw(shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        noise = in_the_loop(family, torch.randn(like.shape, dtype=dtype))
        assert noise.shape == tuple(shape)
        return noise

    try:
        for module in modules:
            module.randn_tensor = draw
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.randn_tensor = own


@by_family
def test_decoding_gives_the_pipelines_pictures(kind: str) -> None:
    """The pipeline's own latents decode to the pipeline's own images; SDXL with statistics of its channels too."""
    variants: list[dict[str, list[float]]] = [{}]
    if kind == "StableDiffusionXLPipeline":
        variants.append({"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.5, 0.7, 1.2, 0.9]})
    for statistics in variants:
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
def test_encoding_gives_the_vaes_latents(kind: str, pipelines: dict[str, Any]) -> None:
    """Images are scaled as the VAE takes them, and its latents come out normalized."""
    family = load_family(pipelines[kind], torch.float32)
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


# ---- Bad input --------------------------------------------------------------------------------------------------


@by_family
def test_sizes_that_do_not_divide_are_refused(kind: str, pipelines: dict[str, Any]) -> None:
    """With the unit that they must be multiples of."""
    family = load_family(pipelines[kind], torch.float32)
    unit = family.size_unit
    for height, width in ((unit + 1, unit), (unit, unit + 1), (0, unit), (-unit, unit)):
        with pytest.raises(ConfigError, match=rf"positive multiples of {unit} .*got {height} x {width}"):
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


def test_guidance_that_a_base_does_not_take_is_refused(tmp_path: Path) -> None:
    """A base distilled without guidance has nothing to be guided by."""
    args = RDMConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, guidance_scale=3.0)
    with pytest.raises(ConfigError, match=r"guidance_scale=3\.0: .* was distilled without guidance"):
        RDMTrainer(TINY_PIPELINES["FluxPipeline"](guidance_embeds=False), "dm", args, PROMPTS)


# ---- Guidance ---------------------------------------------------------------------------------------------------


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


# ---- Stable Diffusion and SDXL ----------------------------------------------------------------------------------


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
