"""What every model family has to do, as functions of a pipeline or of what makes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from pipeline_calls import (
    PROMPTS,
    assert_same_inputs,
    calls_of,
    noise_in_our_shape,
    run_pipeline,
    size_of,
)
from torch import Tensor

from rdm_sdk import RDMConfig, RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.flow import unpack
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.method.noise import from_x_0
from rdm_sdk.training.export import load_student

GUIDED: dict[str, dict[str, Any]] = {
    # How each pipeline call is made to guide by 3 in our terms; the others take guidance_scale=3.
    "QwenImagePipeline": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    "ZImagePipeline": {"guidance_scale": 2.0},
}


def assert_the_backbone_gets_what_the_pipeline_sends(pipeline: Any) -> None:
    """Compare our keyword arguments with the pipeline call's, at both guidance branches and every step."""
    kind = type(pipeline).__name__
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


def assert_a_trained_student_runs_in_plain_diffusers(pipeline: Any, sampler: str, folder: Path) -> None:
    """Train a student a little; the teacher stays bit for bit, and a plain pipeline gives the student's images.

    Args:
        pipeline: the base; written to `folder`, and left as it is.
        sampler: "renoise" or "ode"; for "ode", the code of the model card is run too.
        folder: an empty one.
    """
    pipeline.save_pretrained(folder / "base")
    family = load_family(str(folder / "base"), torch.float32)
    size = size_of(family)
    args = RDMConfig(
        output_dir=str(folder / "run"),
        max_steps=3,
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

    def teacher_x_0() -> Tensor:
        with torch.no_grad():
            return family.denoiser(family.roles, TEACHER, condition)(probe, sigma)

    before = teacher_x_0()
    trainer.train()
    assert torch.equal(teacher_x_0(), before)
    torch.manual_seed(5)
    ours = trainer.sample(PROMPTS, noise=probe)
    trainer.save_model(str(folder / "student"))

    plain = DiffusionPipeline.from_pretrained(folder / "base")
    plain.set_progress_bar_config(disable=True)
    scheduler = family.student_scheduler(4, trainer.models.shift, stochastic=sampler == "renoise")
    plain.scheduler = type(scheduler).from_pretrained(folder / "student", subfolder="scheduler")
    call = family.inference_call(4, args.guidance_scale) | size

    def images(**call: Any) -> Tensor:
        torch.manual_seed(5)
        with noise_in_our_shape(family, probe):
            latents = family.pack(probe.clone())
            return run_pipeline(plain, PROMPTS, latents=latents, output_type="pt", **call)

    without = images(**call)
    theirs = images(**load_student(plain, folder / "student"))
    assert (theirs - ours).abs().max() < 1e-4
    assert (without - ours).abs().max() > 1e-3
    if sampler == "ode":
        assert image_of_the_card(folder / "student").size == (size["width"], size["height"])


def image_of_the_card(folder: Path) -> Any:
    """Run the code of a student's model card, and return the image that it makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names["image"]


def assert_guides_as_the_pipeline(family: ModelFamily, scale: float, **call: Any) -> None:
    """At every step of a guided call, our flow is the one that the pipeline hands to its scheduler."""
    pipeline, seen = family.pipeline, []
    latents = torch.randn(2, *family.latent_shape(**size_of(family)), generator=torch.Generator().manual_seed(0))
    step = pipeline.scheduler.step

    def keep(flow: Tensor, timestep: Tensor, x_t: Tensor, **kwargs: Any) -> Any:
        seen.append((flow, timestep, x_t))
        return step(flow, timestep, x_t, **kwargs)

    pipeline.scheduler.step = keep
    run_pipeline(
        pipeline,
        PROMPTS,
        num_inference_steps=3,
        latents=family.pack(latents),
        output_type="latent",
        **size_of(family),
        **call,
    )
    denoise_pair = family.denoiser_pair(
        family.roles, TEACHER, family.condition(PROMPTS), family.condition([None, None])
    )
    assert len(seen) == 3
    for flow, timestep, x_t in seen:
        sigma = (timestep / 1000).expand(2)
        if x_t.ndim == 3:
            flow, x_t = (unpack(tokens, *latents.shape[-2:]) for tokens in (flow, x_t))
        with torch.no_grad():
            guided = family.guide(x_t, sigma, *denoise_pair(x_t, sigma), scale)
        ours = from_x_0(family.schedule, "flow", guided, x_t, sigma)
        torch.testing.assert_close(ours, flow, rtol=1e-4, atol=1e-4)


def gradients(make: Callable[[], Any], recompute: bool, between: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return gradients of a fixed loss of the student, another role having run before the backward pass, and counts."""
    family = load_family(make(), torch.float32)
    family.add_roles({"student": LoraConfig(r=4), "fake": LoraConfig(r=4)})
    generator = torch.Generator().manual_seed(1)
    for role in ("student", "fake"):
        for parameter in family.roles.parameters_of(role).values():
            parameter.data.normal_(std=0.1, generator=generator)
    if recompute:
        family.roles.gradient_checkpointing_enable()
    condition = family.condition([*PROMPTS, "a cat"])
    x_t = torch.randn(3, *family.latent_shape(**size_of(family)), generator=generator, requires_grad=True)
    sigma = torch.tensor([0.9, 0.5, 0.3])
    loss = family.denoiser(family.roles, "student", condition)(x_t, sigma).square().mean()
    family.denoiser(family.roles, between, condition)(x_t, sigma)
    loss.backward()
    parameters = family.roles.parameters_of("student") | {"x_t": x_t}
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert len(found) == len(parameters)
    return found, dict(family.roles.forwards)


def assert_recomputed_gradients_are_equal(make: Callable[[], Any], other: str) -> None:
    """Checkpointed gradients are the plain ones although another role ran in between, and none of them is zero."""
    plain, counts = gradients(make, recompute=False, between=other)
    assert counts == {"student": 3, other: 3}  # samples
    assert all(gradient.any() for gradient in plain.values())
    adapted = {name.split(".lora_")[0] for name in plain.keys() - {"x_t"}}
    assert adapted == set(load_family(make(), torch.float32).lora_targets)
    recomputed, _ = gradients(make, recompute=True, between=other)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6)
