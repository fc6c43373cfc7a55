"""The networks of a run: what the step asks of them, and a model family that answers it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from rdm_sdk.errors import CheckpointError, ConfigError, DataError, check_texts
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.finite import check_encoding
from rdm_sdk.families.placement import Offload, part_vae
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.method.sampling import FewStepPolicy, sample, sample_each_step
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.training.faults import FiniteWatch
from rdm_sdk.training.method_settings import MethodSettings
from rdm_sdk.training.prompt_cache import PromptCache
from rdm_sdk.training.randomness import forked
from rdm_sdk.training.step_rules import is_guided
from rdm_sdk.types import Condition, Denoiser


class Models(Protocol):
    """What `Judge`, `Rollouts` and `DistillationStep` ask of networks.

    `RunModels` answers for a pipeline; denoisers in closed form can too.
    """

    @property
    def policy(self) -> FewStepPolicy:
        """The student's sampler; its noise schedule is that of all denoisers."""

    @property
    def device(self) -> torch.device:
        """Where samples are made."""

    @property
    def encode(self) -> Callable[[Sequence[str | None]], Condition]:
        """Prompts to what denoisers are told of them; None is the prompt that says nothing."""

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """Return the trained parameters of a role."""

    def denoiser(self, role: str, condition: Condition, steps: Tensor | None = None) -> Denoiser:
        """Return the denoiser of a role ("teacher", "student", "fake", ...) for a condition.

        `steps` (int64 `[N]`) are the student's that made the samples, for critics that are told them.
        """

    def step_shape(self, step: int) -> tuple[int, ...]:
        """Return the shape of the latents of an optimizer step (from 0), the same on all processes."""

    def to_images(self, latents: Tensor) -> Tensor:
        """Return what rewards of images see of latents `[N, *x]`, differentiable in them."""

    def vae_at_hand(self) -> AbstractContextManager[None]:
        """Return a context inside which `to_images` is called and differentiated."""

    def complete(self, context: DiffusionContext, condition: Condition) -> DiffusionContext:
        """Return a context with all that model-aware rewards can ask beside the denoisers, as far as it exists."""


class RunModels:
    """A family with its roles on a device, the student's sampler, prompts, guidance and moving average: `Models`.

    Args:
        family: with the roles added that are trained.
        settings: an `RDMConfig`, or any object with the same fields.
        device: where networks run; VAE and text encoders may wait on the CPU.

    Raises:
        ConfigError: the family is in float16, or guidance or sampler do not fit it.
    """

    def __init__(self, family: ModelFamily, settings: MethodSettings, device: torch.device) -> None:
        self.family, self.roles, self.settings, self.device = family, family.roles, settings, device
        check_fits(family, settings)
        self.latent_shapes = [family.latent_shape(*size) for size in settings.sizes]
        self.shift = family.base_shift(self.latent_shapes[0]) if settings.shift is None else settings.shift
        sigmas = tuple(family.student_sigmas(settings.num_inference_steps, self.shift))
        self.policy = FewStepPolicy(family.schedule, sigmas, settings.sampler, settings.eta)
        self.watch = FiniteWatch()
        self._place()
        self.ema: EMAModel | None = None
        if settings.ema_decay:
            self.ema = EMAModel(self.parameters_of(STUDENT), decay=settings.ema_decay, foreach=True)

    # ---- Places -------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Bring the model to the device, VAE and text encoders as the settings say."""
        settings, family = self.settings, self.family
        part_vae(family, settings.vae_slicing, settings.vae_tiling)
        self._vae = Offload([family.pipeline.vae] if settings.vae_offload else [], self.device)
        offload = settings.text_encoders == "offload"
        encoders = Offload(family.text_encoders().values() if offload else [], self.device)
        family.to(self.device)
        self.encode = PromptCache(
            partial(family.condition, guidance_scale=settings.guidance_scale),
            self.device,
            encoded=encoders.release,
            masks=family.masks,
            check=lambda condition, prompts: check_encoding(condition, prompts, family.text_encoders()),
        )
        if offload:
            self.encode([None])  # now, because its first use is while the student's graph takes the memory

    @contextmanager
    def vae_at_hand(self) -> Iterator[None]:
        """Let the VAE go back to where it waits, if it does, after the block that decodes and differentiates."""
        try:
            yield
        finally:
            self._vae.release()

    # ---- Roles --------------------------------------------------------------------------------------------------

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.roles.parameters_of(role).values())

    @property
    def guided(self) -> bool:
        """Whether the teacher's predictions with and without the prompt are combined to guided ones."""
        return is_guided(self.family, self.settings.guidance_scale)

    def denoiser(self, role: str, condition: Condition, steps: Tensor | None = None) -> Denoiser:
        """Return a role's denoiser for a condition; the teacher's is guided as the settings say."""
        if role != TEACHER or not self.guided:
            made = self.family.denoiser(self.roles, role, self.roles.tell(role, condition, steps))
            return self.watch.watched(role, condition, made)
        pair = self.teacher_pair(condition)
        return self.watch.watched(role, condition, lambda x_t, sigma: self.guide(x_t, sigma, *pair(x_t, sigma)))

    def guide(self, x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor) -> Tensor:
        """Return the guided x_0 `[N, *x]` of the teacher's two predictions."""
        return self.family.guide(x_t, sigma, with_prompt, without, self.settings.guidance_scale)

    def teacher_pair(self, condition: Condition) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return `(x_t, sigma) -> (x_0 with the prompt, x_0 without)` of the teacher, from one pass."""
        count = next(iter(condition.values())).shape[0]
        return self.family.denoiser_pair(self.roles, TEACHER, condition, self.encode([None] * count))

    def complete(self, context: DiffusionContext, condition: Condition) -> DiffusionContext:
        """Return a context with guidance, the teacher's features and without a prompt, and an encoder of images.

        The teacher's graph is kept, to x_t, where the context carries gradients back through it.
        """

        def teacher_pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(context.carries_back):
                return self.teacher_pair(condition)(x_t, sigma)

        @torch.no_grad()
        def unprompted(x_t: Tensor, sigma: Tensor) -> Tensor:
            blank = self.encode([None] * len(x_t))
            return self.family.denoiser(self.roles, TEACHER, blank)(x_t, sigma)

        complete = replace(
            context,
            guide=self.guide if self.guided else None,
            denoiser_pair=teacher_pair,
            features=self.family.features(self.roles, TEACHER, condition),
            encode_images=self.family.encode_images,
            unprompted=unprompted,
            head=self.roles.heads.__getitem__,
        )
        return self.watch.watched_context(complete, condition)

    # ---- Samples ------------------------------------------------------------------------------------------------

    def step_shape(self, step: int) -> tuple[int, ...]:
        # By the seed and the step alone, so that all processes and a resumed run agree.
        return random.Random(f"{self.settings.seed} {step}").choice(self.latent_shapes)

    def sample_latents(self, prompts: Sequence[str], noise: Tensor | None = None) -> Tensor:
        """Sample the student from noise `[N, *x]`, by default drawn at the first resolution; returns x_0 `[N, *x]`.

        Raises:
            DataError: the prompts are no list of texts, or the noise is for another number of them.
        """
        prompts = check_texts(prompts, "prompts", DataError)
        noise = self._initial_noise(len(prompts)) if noise is None else noise.to(self.device)
        if len(noise) != len(prompts):
            raise DataError(f"noise must be one per prompt, {len(prompts)}; got shape {list(noise.shape)}")
        return sample(self.denoiser(STUDENT, self.encode(prompts)), noise, self.policy.inference())

    def sample_each_step(self, prompts: Sequence[str]) -> list[Tensor]:
        """Sample the student, and return what it predicts after each of its K evaluations, K times `[N, *x]`."""
        prompts = check_texts(prompts, "prompts", DataError)
        student = self.denoiser(STUDENT, self.encode(prompts))
        return list(sample_each_step(student, self._initial_noise(len(prompts)), self.policy.inference()))

    def to_images(self, latents: Tensor) -> Tensor:
        """Return the images `[N, 3, H, W]` in [0, 1] of latents `[N, *x]`, differentiable in them."""
        return self.family.decode(latents)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Return the images `[N, 3, H, W]` in [0, 1] of several batches of latents `[N, *x]`."""
        with self.vae_at_hand():
            return [self.to_images(some) for some in latents]

    def _initial_noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.latent_shapes[0], device=self.device)

    @contextmanager
    def seeded(self, seed: int | None) -> Iterator[None]:
        """Fix the seed for the duration of the block, and count none of its forwards as training cost."""
        forwards = self.roles.forwards.copy()
        try:
            if seed is None:
                yield
            else:
                with forked(self.device):
                    torch.manual_seed(seed)
                    yield
        finally:
            self.roles.forwards = forwards

    # ---- Moving average -----------------------------------------------------------------------------------------

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """Put the moving average in the student's place for the duration of the block."""
        if self.ema is None:
            yield
            return
        parameters = self.parameters_of(STUDENT)
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def move_average(self) -> None:
        """Update the moving average, after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.parameters_of(STUDENT))

    def load_average(self, shadow: Mapping[int, Tensor], directory: str) -> None:
        """Take up a checkpoint's moving average, by position.

        Raises:
            CheckpointError: it holds other tensors than the run's.
        """
        if self.ema is None:
            return
        if sorted(shadow) != list(range(len(self.ema.shadow_params))):
            raise CheckpointError(
                f"cannot load {directory!r}: its moving average holds {len(shadow)} tensors, "
                f"this run's {len(self.ema.shadow_params)}; was the run started with other LoRA targets?"
            )
        for position, average in enumerate(self.ema.shadow_params):
            average.copy_(shadow[position])


def check_fits(family: ModelFamily, settings: MethodSettings) -> None:
    """Raise `ConfigError` if a family cannot be trained in its dtype, or guidance or sampler do not fit it."""
    if family.dtype == torch.float16:
        raise ConfigError(
            f"the base {family.base_name!r} is in float16, in which gradients underflow, and which autocast in "
            "bfloat16 does not take; load it with torch_dtype=torch.bfloat16, or torch.float32"
        )
    if family.guidance == "none" and settings.guidance_scale != 1.0:
        raise ConfigError(
            f"guidance_scale={settings.guidance_scale}: {family.base_name!r} was distilled without guidance, and "
            "its pipeline takes none; set guidance_scale=1"
        )
    if settings.sampler == "sde" and not isinstance(family.schedule, FlowSchedule):
        raise ConfigError(
            f"sampler='sde' is derived for rectified flows, and {family.base_name!r} is none; use 'cps' or 'renoise'"
        )
