"""What a model family has to do as a teacher, one check each; `family_kit.py` runs them.

A check takes a `ModelSubject`; see `kit.Check`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import Guidance
from rdm_sdk.families.encodings import full_lengths, padded, rows_without_padding
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.families.targets import linear_layers
from rdm_sdk.method.noise import Prediction, to_x_0
from rdm_sdk.method.sampling import FewStepPolicy
from rdm_sdk.testing.family_subject import (
    CLOSE,
    NUM_STEPS,
    PROMPTS,
    ModelSubject,
    compare_with_the_pipeline,
    relative_difference,
    rows,
)
from rdm_sdk.testing.kit import Check, Remark, advising, collector, require
from rdm_sdk.types import Condition

TEACHER_CHECKS: list[Check] = []
check = collector(TEACHER_CHECKS)


@check()
def declarations(subject: ModelSubject) -> None:
    """What the class declares exists: component, LoRA targets and exclusions, kinds of prediction and guidance."""
    family = subject.family
    for attribute, kinds in (("prediction", get_args(Prediction)), ("guidance", get_args(Guidance))):
        kind = getattr(family, attribute)
        require(kind in kinds, f"{attribute} is {kind!r}; it must be one of {', '.join(kinds)}")
    layers = linear_layers(family.backbone)
    require(family.lora_targets, "lora_targets is empty, so a student would have nothing to learn with")
    for attribute in ("lora_targets", "lora_excluded"):
        for ending in getattr(family, attribute):
            require(
                any(f".{name}".endswith(f".{ending}") for name in layers),
                f"no linear or convolution layer's name ends in {ending!r}, of {attribute}; there are, among others, "
                f"{', '.join(sorted({'.'.join(name.split('.')[-2:]) for name in layers})[:16])}",
            )


@check()
def encodes_prompts(subject: ModelSubject) -> None:
    """`encode_prompts` returns tensors `[N, ...]` whose shapes do not depend on the prompts."""
    family = subject.family
    together = family.encode_prompts(list(PROMPTS))
    require(
        isinstance(together, dict) and all(isinstance(value, Tensor) for value in together.values()),
        "encode_prompts() must return a dict of tensors",
    )
    for name, tensor in together.items():
        require(
            len(tensor) == len(PROMPTS),
            f"{name!r} has shape {list(tensor.shape)} for {len(PROMPTS)} prompts; its first dimension is the batch",
        )
        require(not tensor.requires_grad, f"{name!r} requires gradients; encode under torch.no_grad()")
    for place, prompt in enumerate(PROMPTS):
        alone = family.encode_prompts([prompt])
        for name, tensor in together.items():
            require(
                alone[name].shape[1:] == tensor.shape[1:],
                f"{name!r} is {list(alone[name].shape[1:])} for {prompt!r} alone and {list(tensor.shape[1:])} beside a "
                "longer one; pad to max_sequence_length, and return a mask if the backbone takes one",
            )
            require(
                relative_difference(alone[name].float(), tensor[place : place + 1].float()) < CLOSE,
                f"{name!r} of {prompt!r} depends on the prompts beside it",
            )
    require(
        any(not torch.equal(tensor[0], tensor[1]) for tensor in together.values()),
        "two prompts are encoded alike",
    )


@check("encodes_prompts")
def encodes_no_prompt(subject: ModelSubject) -> None:
    """`encode_no_prompt` returns one row that can stand beside those of prompts."""
    blank, encoded = subject.family.encode_no_prompt(), subject.family.encode_prompts(PROMPTS[:1])
    require_same_form(blank, encoded)


def require_same_form(found: Condition, encoded: Condition) -> None:
    """Raise `AssertionError` unless names, shapes and dtypes are those that `encode_prompts` returned."""
    require(found.keys() == encoded.keys(), f"it has {sorted(found)}, and encode_prompts() {sorted(encoded)}")
    for name, tensor in encoded.items():
        require(
            found[name].shape == tensor.shape and found[name].dtype == tensor.dtype,
            f"{name!r} is {list(found[name].shape)} ({found[name].dtype}), and of prompts {list(tensor.shape)} "
            f"({tensor.dtype})",
        )


@check()
def sizes(subject: ModelSubject) -> None:
    """Latents have `[C, h, w]` for sizes that divide, and others are refused."""
    family = subject.family
    for height, width in (family.default_size, subject.size):
        shape = family.latent_shape(height, width)
        require(len(shape) == 3, f"latent_shape() is {list(shape)}; it must be channels, height, width")
        require(shape[1] * width == shape[2] * height, f"{height} x {width} pixels have latents of {list(shape)}")
    require(family.latent_shape() == family.latent_shape(*family.default_size), "without a size, it is the default")
    if family.size_unit > 1:
        try:
            family.latent_shape(subject.size[0] + 1, subject.size[1])
        except ConfigError:
            return
        raise AssertionError(f"a height of {subject.size[0] + 1} is not refused; raise ConfigError")


@check("encodes_prompts", "sizes")
def denoises(subject: ModelSubject) -> None:
    """The teacher's denoiser returns finite x_0 in float32, of the latents' shape."""
    with advising("predict() must pass what the family's pipeline passes to its backbone"):
        x_0 = subject.denoise(subject.teacher())
    require(
        x_0.shape == subject.x_t.shape,
        f"predict() returned {list(x_0.shape)} for latents {list(subject.x_t.shape)}; undo what it packs, and drop a "
        "learned variance",
    )
    require(x_0.dtype == torch.float32, f"x_0 is {x_0.dtype}")
    require(x_0.isfinite().all(), "x_0 holds NaN or infinities")


@check("denoises")
def samples_stand_alone(subject: ModelSubject) -> None:
    """A sample's x_0 depends on its own state, noise level and prompt alone."""
    together = subject.denoise(subject.teacher())
    for place in range(2):
        denoiser = subject.teacher(rows(subject.condition, place))
        with torch.no_grad():
            alone = denoiser(subject.x_t[place : place + 1], subject.sigma[place : place + 1])
        require(
            relative_difference(alone, together[place : place + 1]) < CLOSE,
            "x_0 differs when a sample is denoised alone; use every sample's own sigma (not sigma[0]) and mask",
        )


@check("denoises", "encodes_no_prompt")
def masks_hide_padding(subject: ModelSubject) -> None:
    """Where there are `masks`, what they hide of an encoding changes no x_0: it is kept as zeros."""
    family = subject.family
    condition = family.condition([PROMPTS[0], None])
    for pair in family.masks:
        for name in pair:
            require(name in condition, f"masks names {name!r}, and encode_prompts() returns {', '.join(condition)}")
    kept = rows_without_padding(condition, family.masks)
    again = padded(kept, full_lengths(condition, family.masks), family.device)
    require(
        torch.equal(subject.denoise(subject.teacher(again)), subject.denoise(subject.teacher(condition))),
        "x_0 is another when what masks hide is 0; leave masks alone where the backbone looks at padded tokens",
    )


@check("denoises")
def follows_prompt_and_level(subject: ModelSubject) -> None:
    """Other prompts and other noise levels give another x_0."""
    x_0 = subject.denoise(subject.teacher())
    swapped = subject.denoise(subject.teacher(rows(subject.condition, 1, 0)))
    require(not torch.equal(x_0, swapped), "x_0 does not depend on the prompt; pass the condition to the backbone")
    family = subject.family

    def raw(sigma: Tensor) -> Tensor:
        with torch.no_grad():
            return family.predict(family.roles, TEACHER, subject.x_t, sigma, subject.condition)

    require(
        not torch.equal(raw(subject.sigma), raw(subject.sigma.flip(0))),
        "the backbone's prediction does not depend on sigma; pass it the timestep",
    )


@check("denoises")
def grid(subject: ModelSubject) -> None:
    """The student's noise levels fall, and both of its schedulers follow them."""
    family = subject.family
    for num_steps in (1, 2, NUM_STEPS):
        sigmas = family.student_sigmas(num_steps, None)
        require(len(sigmas) == num_steps, f"student_sigmas({num_steps}, None) has {len(sigmas)} levels")
        require(
            all(a > b for a, b in pairwise([*sigmas, 0.0])) and sigmas[0] <= 1,
            f"student_sigmas({num_steps}, None) is {sigmas}; it must fall within (0, 1]",
        )
        times = []
        for stochastic in (True, False):
            scheduler = family.student_scheduler(num_steps, None, stochastic)
            family.set_grid(scheduler, num_steps)
            times.append(scheduler.timesteps.tolist())
        require(times[0] == times[1], f"the stochastic scheduler runs at {times[0]}, the deterministic at {times[1]}")


@check("grid")
def steps_as_the_scheduler(subject: ModelSubject) -> None:
    """Every deterministic step leads where the exported scheduler's leads."""
    family = subject.family
    scheduler = family.student_scheduler(NUM_STEPS, None, stochastic=False)
    family.set_grid(scheduler, NUM_STEPS)
    policy = FewStepPolicy(family.schedule, tuple(family.student_sigmas(NUM_STEPS, None)), "ode")
    x_t = subject.x_t
    for k, timestep in enumerate(scheduler.timesteps):
        steps = torch.full((2,), k)
        sigma = policy.levels(steps)
        with torch.no_grad():
            prediction = family.predict(family.roles, TEACHER, x_t, sigma, subject.condition).float()
        x_0 = to_x_0(family.schedule, family.prediction, prediction, x_t, sigma)
        ours = policy.transition(x_t, x_0, steps).mean if k + 1 < NUM_STEPS else x_0
        theirs = scheduler.step(prediction, timestep, x_t).prev_sample
        require(
            relative_difference(ours, theirs) < CLOSE,
            f"step {k} (sigma {float(sigma[0]):.4g}, timestep {float(timestep):.4g}) leads elsewhere than "
            f"{type(scheduler).__name__}'s; check `schedule` and `prediction`",
        )
        x_t = theirs


@check("sizes")
def decodes(subject: ModelSubject) -> None:
    """`decode` returns RGB images in [0, 1] of the size asked for, differentiable."""
    latents = subject.x_t.clone().requires_grad_()
    images = subject.family.decode(latents)
    wanted = (2, 3, *subject.size)
    require(tuple(images.shape) == wanted, f"decode() returned {list(images.shape)}; it should be {list(wanted)}")
    require(images.min() >= 0 and images.max() <= 1, "images must lie in [0, 1]")
    images.sum().backward()
    require(
        latents.grad is not None and bool(latents.grad.any()),
        "no gradient reaches the latents; decode without no_grad, detach or rounding",
    )


@check("decodes")
def encodes_images(subject: ModelSubject) -> None:
    """`encode_images` returns latents of the right shape, and `from_vae` undoes `to_vae`."""
    family = subject.family
    images = torch.rand(2, 3, *subject.size, generator=torch.Generator().manual_seed(0))
    latents = family.encode_images(images)
    require(
        latents.shape == subject.x_t.shape,
        f"encode_images() returned {list(latents.shape)}; it should be {list(subject.x_t.shape)}",
    )
    again = family.from_vae(family.to_vae(subject.x_t))
    require(relative_difference(again, subject.x_t) < CLOSE, "from_vae() does not undo to_vae()")


@check("steps_as_the_scheduler", "decodes", "encodes_images")
def agrees_with_the_pipeline(subject: ModelSubject) -> None:
    """A plain pipeline call with the student's scheduler and `inference_call` makes the images that we make."""
    compare_with_the_pipeline(subject, 1.0)


@check("agrees_with_the_pipeline", "encodes_no_prompt")
def guides_as_the_pipeline(subject: ModelSubject) -> Remark | None:
    """A pipeline call that is guided by 3 (`guidance_call`) makes the images that our guided teacher makes."""
    if subject.family.guidance != "classifier-free":
        return Remark("skipped", f"guidance is {subject.family.guidance!r}")
    compare_with_the_pipeline(subject, 3.0)
    return None


@check("denoises")
def features(subject: ModelSubject) -> Remark | None:
    """Features for discriminators, if there are any, are `[N, tokens, feature_width]` and differentiable."""
    family = subject.family
    try:
        width = family.feature_width
    except ModelError:
        return Remark("skipped", "the family names no features, so rewards with a head on them cannot be used")
    x_t = subject.x_t.clone().requires_grad_()
    found = family.features(family.roles, TEACHER, subject.condition)(x_t, subject.sigma)
    require(
        found.ndim == 3 and len(found) == 2 and found.shape[2] == width,
        f"features are {list(found.shape)}; they should be [2, tokens, {width}]",
    )
    found.sum().backward()
    require(x_t.grad is not None and bool(x_t.grad.any()), "no gradient reaches x_t through the features")
    for place in range(2):
        condition = rows(subject.condition, place)
        alone = family.features(family.roles, TEACHER, condition)(x_t[[place]], subject.sigma[[place]])
        require(
            alone.shape == found[[place]].shape and relative_difference(alone, found[[place]]) < CLOSE,
            "features of a sample differ when it is alone; override features() to take the image's tokens only, where "
            "a block returns those of the text or padding too",
        )
    return None


@check("encodes_prompts")
def example_encoding(subject: ModelSubject) -> Remark | None:
    """`example_encoding` has the names, shapes and dtypes of what `encode_prompts` returns."""
    try:
        example = subject.family.example_encoding(len(PROMPTS))
    except ModelError:
        return Remark("skipped", "the family names no example_encoding, so rdm-sdk plan cannot be used")
    require_same_form(example, subject.family.encode_prompts(list(PROMPTS)))
    return None
