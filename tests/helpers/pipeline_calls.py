"""What a pipeline's own call sends to its networks, to compare with what a family sends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm
from torch import Tensor

from rdm_sdk.families.base import ModelFamily

PROMPTS = ["a red fox", "two boats on a lake"]  # of two lengths, so that masks matter
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


def calls_of(pipeline: Any, component: str, run: Callable[[], object]) -> list[dict[str, Any]]:
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
    """Compare value for value, in kinds, shapes and float32 numbers; the encoders' last bits depend on the batch.

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
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")
    else:
        assert ours == theirs, name


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
        for module, function in zip(modules, before, strict=True):
            module.randn_tensor = function
