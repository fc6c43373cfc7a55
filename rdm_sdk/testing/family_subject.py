"""The model family under test, and its pipeline beside it: where two programs that should agree part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.method.sampling import FewStepPolicy, sample
from rdm_sdk.types import Condition, Denoiser

PROMPTS = ["a red fox", "two boats on a lake, at night, seen from afar"]
NUM_STEPS = 4
CLOSE = 1e-4
"""Up to which relative difference outputs of float32 networks are equal, in other batches or in another program."""

LORA = LoraConfig(r=4, lora_alpha=12)
"""Alpha is not the rank: a format that loses it is noticed."""


@dataclass(frozen=True)
class ModelSubject:
    """A model family under test: `make` returns a pipeline or a family, with the same weights every time."""

    make: Callable[[], Any]

    def fresh(self) -> ModelFamily:
        """Return a family that a check may change."""
        made = self.make()
        if not isinstance(made, ModelFamily):
            made.set_progress_bar_config(disable=True)
        return load_family(made, torch.float32)

    @cached_property
    def family(self) -> ModelFamily:
        """A family that checks leave as it is."""
        return self.fresh()

    def freshly_trained(self) -> ModelFamily:
        """Return a fresh family with a student and a critic whose weights are random, the same ones every time."""
        family = self.fresh()
        family.add_roles({STUDENT: LORA, "fake": LORA})
        generator = torch.Generator().manual_seed(1)
        for role in (STUDENT, "fake"):
            for parameter in family.roles.parameters_of(role).values():
                with torch.no_grad():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return family

    @cached_property
    def trained(self) -> ModelFamily:
        """A family with a student and a critic that checks leave as it is; adapters take long to put in."""
        return self.freshly_trained()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: small, and not square if the base allows it.

        The height is an odd multiple of the unit, so that a unit that is too small is noticed.
        """
        unit = self.family.size_unit
        height = (max(1, 32 // unit) // 2 * 2 + 1) * unit
        try:
            self.family.latent_shape(height, 2 * height)
        except ConfigError:
            return self.family.default_size
        return height, 2 * height

    @property
    def shape(self) -> tuple[int, ...]:
        return self.family.latent_shape(*self.size)

    @cached_property
    def condition(self) -> Condition:
        return self.family.condition(PROMPTS)

    @cached_property
    def x_t(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))

    @property
    def sigma(self) -> Tensor:
        return torch.tensor([0.8, 0.4])

    def denoise(self, denoiser: Denoiser) -> Tensor:
        with torch.no_grad():
            return denoiser(self.x_t, self.sigma)

    def teacher(self, condition: Condition | None = None) -> Denoiser:
        """Return the teacher's denoiser, by default for the two prompts."""
        family = self.family
        return family.denoiser(family.roles, TEACHER, self.condition if condition is None else condition)


def rows(condition: Condition, *places: int) -> Condition:
    return {name: tensor[list(places)] for name, tensor in condition.items()}


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).detach())


def compare_with_the_pipeline(subject: ModelSubject, scale: float) -> None:
    """Raise `AssertionError` unless the two programs make the same images; the message names where they part."""
    family, noise = subject.fresh(), subject.x_t
    with seen_by(family.backbone) as ours_saw:
        ours = images_of(family, TEACHER, noise, scale)
    family.pipeline.scheduler = family.student_scheduler(NUM_STEPS, None, stochastic=False)
    with seen_by(family.backbone) as theirs_saw:
        theirs = call(family, family.pipeline, noise, scale)
    if relative_difference(ours, theirs) < CLOSE:
        return
    guided = scale != 1
    parting = None if guided else first_difference(ours_saw, theirs_saw)
    where = parting or (
        "compare guide(), encode_no_prompt() and guidance_call() with what the call does to its two predictions"
        if guided
        else "the backbone was told the same in every step, so it is what follows it: to_vae(), or decode()"
    )
    raise AssertionError(
        f"our images differ from the pipeline's by up to {float((ours - theirs).abs().max()):.3g}; {where}"
    )


@contextmanager
def seen_by(backbone: Any) -> Iterator[list[dict[str, Any]]]:
    """Collect the named arguments of every call of a backbone, without those that are None."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(backbone).forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append({k: v for k, v in bound.items() if v is not None and k not in ("self", "return_dict")})

    handle = backbone.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """Return the first argument of the backbone that differs between two runs, in words."""
    if len(ours) != len(theirs):
        return f"the backbone was called {len(ours)} times by ours and {len(theirs)} times by the pipeline"
    for step, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
        for name in sorted(mine.keys() ^ their.keys()):
            who = "we" if name in mine else "the pipeline"
            return f"in step {step}, only {who} told the backbone {name!r}"
        different = [name for name in mine if not alike(mine[name], their[name])]
        # What a step is told of time or text explains its state's successor; the state itself comes last.
        for name in sorted(different, key=lambda name: isinstance(mine[name], Tensor) and mine[name].ndim >= 4):
            state = step > 0 and len(different) == 1
            advice = " (only the state: the sign or form of what predict() returned, or the grid)" if state else ""
            return f"in step {step}, {name!r} was {shown(mine[name])} in ours and {shown(their[name])} there{advice}"
    return None


def alike(mine: Any, their: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(their, Tensor):
        if their.ndim == 0 or their.numel() == 1:
            their = their.reshape(()).expand_as(mine)
        return mine.shape == their.shape and relative_difference(mine.float(), their.float()) < CLOSE
    if isinstance(mine, (list, tuple)) and isinstance(their, (list, tuple)):
        return len(mine) == len(their) and all(alike(a, b) for a, b in zip(mine, their, strict=True))
    if isinstance(mine, dict) and isinstance(their, dict):
        return mine.keys() == their.keys() and all(alike(mine[name], their[name]) for name in mine)
    return bool(mine == their)


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        some = ", ".join(f"{number:.4g}" for number in value.flatten()[:3].tolist())
        return f"{list(value.shape)} [{some}{', ...' if value.numel() > 3 else ''}]"
    return str(value)[:80]


def images_of(family: ModelFamily, role: str, noise: Tensor, scale: float = 1.0) -> Tensor:
    """Return the images `[2, 3, H, W]` that a role, guided by `scale`, samples deterministically for `PROMPTS`."""
    policy = FewStepPolicy(family.schedule, tuple(family.student_sigmas(NUM_STEPS, None)), "ode")
    condition = family.condition(PROMPTS)
    denoiser = family.denoiser(family.roles, role, condition)
    if scale != 1:
        pair = family.denoiser_pair(family.roles, role, condition, family.condition([None, None]))

        def denoiser(x_t: Tensor, sigma: Tensor) -> Tensor:
            return family.guide(x_t, sigma, *pair(x_t, sigma), scale)

    with torch.no_grad():
        return family.decode(sample(denoiser, noise, policy))


def call(family: ModelFamily, pipeline: Any, noise: Tensor, scale: float = 1.0) -> Tensor:
    """Return the images of a plain pipeline call."""
    arguments = family.inference_call(NUM_STEPS) | family.guidance_call(scale)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    images: Tensor = pipeline(
        prompt=list(PROMPTS),
        latents=family.pack(noise.clone()),
        **dict(zip(("height", "width"), pixels(family, noise), strict=True)),
        output_type="pt",
        **arguments,
    ).images
    return images


def pixels(family: ModelFamily, latents: Tensor) -> tuple[int, int]:
    factor = family.default_size[0] // family.latent_shape()[1]
    return latents.shape[-2] * factor, latents.shape[-1] * factor
