"""The passes of a training step, run on a pipeline without weights to see how much memory each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.placement import slice_vae, tile_vae
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.planning.footprint import LikeCuda, Meter
from rdm_sdk.types import Condition, Denoiser

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tape:
    """What a pass with gradients takes, in bytes, besides its inputs and the weights."""

    kept: int
    """Alive between the forward and the backward pass: what autograd saves, and the output."""
    forward: int
    """The most during the forward pass."""
    backward: int
    """The most during the backward pass, the gradients that it makes included."""

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def _once(
    run: Callable[Concatenate[Rehearsal, Given], Result],
) -> Callable[Concatenate[Rehearsal, Given], Result]:
    """Let a method remember what it found for the same arguments."""

    @wraps(run)
    def remembered(self: Rehearsal, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        key = run.__name__, args, tuple(sorted(kwargs.items()))
        if key not in self._found:
            self._found[key] = run(self, *args, **kwargs)
        found: Result = self._found[key]
        return found

    return remembered


class Rehearsal:
    """Runs a family's backbone and VAE on the meta device, as a training step does.

    Attention and autocast are those of a CUDA device (`LikeCuda`); prompts are as long as they can be. The same pass is
    run once.

    Args:
        family: a `blueprint` with its roles.
        shape: of one latent, `[C, h, w]`.
        autocast: what matrix products are computed in; None is the weights' own dtype.
    """

    def __init__(self, family: ModelFamily, shape: Sequence[int], autocast: torch.dtype | None = None) -> None:
        self.family, self.shape = family, tuple(shape)
        self._mode = LikeCuda(autocast)
        self._running = TEACHER
        self._found: dict[Any, Any] = {}

    def condition(self, count: int) -> Condition:
        """Return the condition of `count` prompts, `[count, ...]`."""
        condition = self.family.example_encoding(count)
        if self.family.guidance == "embedded":
            condition["guidance"] = torch.zeros(count, device=self.family.device)
        return condition

    # ---- The backbone's passes, in bytes ------------------------------------------------------------------------

    @_once
    def predict(self, role: str, count: int) -> int:
        """Return the peak of one pass of a role for `count` samples, without gradients."""
        condition, (x_t, sigma) = self.condition(count), self._samples(count)
        with self._mode, (meter := Meter()), torch.no_grad():
            self._denoiser(role, condition)(x_t, sigma)
        return meter.peak

    @_once
    def predict_pair(self, count: int) -> int:
        """Return the peak of the teacher's pass for `count` samples with and without their prompts."""
        condition, (x_t, sigma) = self.condition(count), self._samples(count)
        with self._mode, (meter := Meter()), torch.no_grad():
            unconditional = self.condition(count)
            self.family.denoiser_pair(self._network, TEACHER, condition, unconditional)(x_t, sigma)
        return meter.peak

    @_once
    def train(self, role: str, count: int, checkpointing: bool, accumulates: bool = False) -> Tape:
        """Return what a pass with gradients takes for a role that is trained.

        Args:
            role: student or critic.
            count: samples.
            checkpointing: whether blocks are run again in the backward pass.
            accumulates: whether the role's gradients are there already, from a pass before; they are not counted.
        """
        condition, (x_t, sigma) = self.condition(count), self._samples(count)
        with self._blocks_run_again(checkpointing), self._mode, (meter := Meter()):
            for _ in range(2 if accumulates else 1):
                there = meter.peak = meter.live
                x_0 = self._denoiser(role, condition)(x_t, sigma)
                forward, kept = meter.peak, meter.live
                loss = (x_0 - x_t).square().mean()
                meter.peak = meter.live
                del x_0
                torch.autograd.backward(loss)
                del loss
        for parameter in self.family.roles.parameters_of(role).values():
            parameter.grad = None
        return Tape(kept - there, forward - there, meter.peak - there)

    @_once
    def features(self, count: int, checkpointing: bool) -> int:
        """Return the peak of the teacher's features for `count` samples and of their gradient in x_t."""
        condition, (x_t, sigma) = self.condition(count), self._samples(count)
        with self._blocks_run_again(checkpointing), self._mode, (meter := Meter()):
            found = self.family.features(self._network, TEACHER, condition)(x_t.requires_grad_(), sigma)
            torch.autograd.grad(found.sum(), x_t)
        return meter.peak

    @_once
    def carry_back(self, count: int, checkpointing: bool, guided: bool) -> Tape:
        """Return what the teacher's pass takes for `count` samples where a gradient is carried back to x_t."""
        condition, (x_t, sigma) = self.condition(count), self._samples(count)
        x_t.requires_grad_()
        with self._blocks_run_again(checkpointing), self._mode, (meter := Meter()):
            if guided:
                pair = self.family.denoiser_pair(self._network, TEACHER, condition, self.condition(count))
                x_0 = torch.stack(pair(x_t, sigma)).sum(0)
            else:
                x_0 = self.family.denoiser(self._network, TEACHER, condition)(x_t, sigma)
            forward, kept = meter.peak, meter.live
            meter.peak = meter.live
            torch.autograd.grad(x_0, x_t, torch.ones_like(x_0), retain_graph=True)  # other rewards follow
        return Tape(kept, forward, meter.peak)

    # ---- The VAE's, in bytes ------------------------------------------------------------------------------------

    @_once
    def decode(self, count: int, slicing: bool, tiling: bool) -> int:
        """Return the peak of decoding `count` latents, without gradients."""
        latents = self._samples(count)[0]
        with self._vae_in_parts(slicing, tiling), LikeCuda(), (meter := Meter()), torch.no_grad():
            self.family.decode(latents)
        return meter.peak

    @_once
    def decode_to_differentiate(self, count: int, slicing: bool, tiling: bool) -> Tape:
        """Return what decoding `count` latents takes whose images rewards differentiate."""
        latents = self._samples(count)[0].requires_grad_()
        with self._vae_in_parts(slicing, tiling), LikeCuda(), (meter := Meter()):
            images = self.family.decode(latents)
            forward, kept = meter.peak, meter.live
            meter.peak = meter.live
            torch.autograd.grad(images, latents, torch.empty_like(images))
        return Tape(kept, forward, meter.peak)

    @_once
    def encode(self, count: int, slicing: bool, tiling: bool) -> int:
        """Return the peak of encoding `count` images."""
        with self._vae_in_parts(slicing, tiling), LikeCuda(), torch.no_grad():
            images = self.family.decode(self._samples(count)[0])
            with (meter := Meter()):
                self.family.encode_images(images)
        return meter.peak

    # ---- How they are run ---------------------------------------------------------------------------------------

    def _samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Return x_t `[count, *x]` and noise levels `[count]`."""
        device = self.family.device
        return torch.zeros(count, *self.shape, device=device), torch.full((count,), 0.5, device=device)

    def _denoiser(self, role: str, condition: Condition) -> Denoiser:
        """Return a role's denoiser; a critic that is told the student's step is told it."""
        count = next(iter(condition.values())).shape[0]
        steps = torch.zeros(count, dtype=torch.long, device=self.family.device)
        return self.family.denoiser(self._network, role, self.family.roles.tell(role, condition, steps))

    def _network(self, role: str, **inputs: Any) -> Tensor:
        """Run the backbone as `Roles` does, but for its autocast, which knows no meta device."""
        roles = self.family.roles
        self._running = role
        with roles.use(role), self._mode.one_forward():
            output: Tensor = dict(roles.copies.items()).get(role, roles.backbone)(**inputs, return_dict=False)[0]
        return output

    @contextmanager
    def _blocks_run_again(self, checkpointing: bool) -> Iterator[None]:
        """Switch gradient checkpointing on for the block.

        Raises:
            ModelError: the backbone has none.
        """
        if not checkpointing:
            yield
            return
        roles = self.family.roles
        roles.gradient_checkpointing_enable()
        networks: list[Any] = [roles.backbone, *roles.copies.values()]
        run = partial(checkpoint, use_reentrant=False, context_fn=self._checkpoint_contexts)
        for network in networks:
            network.enable_gradient_checkpointing(run)
        try:
            yield
        finally:
            for network in networks:
                network.disable_gradient_checkpointing()

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a block's forward pass and of its replay, which PyTorch runs outside of all modes."""
        return self.family.roles.use(self._running), self._replay(self._running)

    @contextmanager
    def _replay(self, role: str) -> Iterator[None]:
        with self._mode, self.family.roles.use(role):
            yield

    @contextmanager
    def _vae_in_parts(self, slicing: bool, tiling: bool) -> Iterator[None]:
        """Switch the VAE's slicing and tiling on for the block.

        Raises:
            ConfigError: the VAE does not have it.
        """
        vae = self.family.pipeline.vae
        if slicing:
            slice_vae(self.family)
        if tiling:
            tile_vae(self.family)
        try:
            yield
        finally:
            if slicing:
                vae.disable_slicing()
            if tiling:
                vae.disable_tiling()
