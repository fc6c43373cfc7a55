"""The passes of a training step, run on a pipeline without weights to see how much memory each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.placement import part_vae
from rdm_sdk.families.roles import TEACHER, Roles
from rdm_sdk.planning.footprint import LikeCuda, Meter
from rdm_sdk.types import Condition, Denoiser


class Tape(NamedTuple):
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


class Rehearsal:
    """Runs a family's backbone and VAE on the meta device, as a training step does; the same pass is run once.

    Attention and autocast are those of a CUDA device (`LikeCuda`); prompts are as long as they can be.

    Args:
        family: a `blueprint` with its roles.
        shape: of one latent, `[C, h, w]`.
        autocast: what matrix products are computed in; None is the weights' own dtype.
    """

    def __init__(self, family: ModelFamily, shape: Sequence[int], autocast: torch.dtype | None = None) -> None:
        self.family, self.shape = family, tuple(shape)
        self._mode = LikeCuda(autocast)
        roles: Any = family.roles
        roles._checkpoint_contexts = self._checkpoint_contexts
        for name in ("predict", "predict_pair", "train", "features", "carry_back", "decode", "differentiate", "encode"):
            setattr(self, name, cache(getattr(self, name)))

    def condition(self, count: int) -> Condition:
        """Return the condition of `count` prompts, `[count, ...]`."""
        condition = self.family.example_encoding(count)
        if self.family.guidance == "embedded":
            condition["guidance"] = torch.zeros(count, device=self.family.device)
        return condition

    # ---- The backbone's passes, in bytes ------------------------------------------------------------------------

    def predict(self, role: str, count: int) -> int:
        """Return the peak of one pass of a role for `count` samples, without gradients."""
        condition, x_t, sigma = self._inputs(count)
        return _peak(self._mode, lambda: self._denoiser(role, condition)(x_t, sigma))

    def predict_pair(self, count: int) -> int:
        """Return the peak of the teacher's pass for `count` samples with and without their prompts."""
        condition, x_t, sigma = self._inputs(count)
        return _peak(self._mode, lambda: self._pair(condition, count)(x_t, sigma))

    def train(self, role: str, count: int, checkpointing: bool, accumulates: bool = False) -> Tape:
        """Return what a pass with gradients takes for `count` samples of a role that is trained.

        `checkpointing` runs blocks again in the backward pass. Where the role `accumulates` gradients, they are there
        already, from a pass before, and are not counted.
        """
        condition, x_t, sigma = self._inputs(count)
        self._run_blocks_again(checkpointing)
        tape = _tape(
            self._mode,
            lambda: self._denoiser(role, condition)(x_t, sigma),
            lambda held: torch.autograd.backward((held.pop() - x_t).square().mean()),
            2 if accumulates else 1,
        )
        for parameter in self.family.roles.parameters_of(role).values():
            parameter.grad = None
        return tape

    def features(self, count: int, checkpointing: bool) -> int:
        """Return the peak of the teacher's features for `count` samples and of their gradient in x_t."""
        condition, x_t, sigma = self._inputs(count)
        x_t.requires_grad_()
        features = self.family.features(self._network, TEACHER, condition)
        self._run_blocks_again(checkpointing)
        tape = _tape(self._mode, lambda: features(x_t, sigma), lambda held: torch.autograd.grad(held[0].sum(), x_t))
        return tape.peak

    def carry_back(self, count: int, checkpointing: bool, guided: bool) -> Tape:
        """Return what the teacher's pass takes for `count` samples where a gradient is carried back to x_t."""
        condition, x_t, sigma = self._inputs(count)
        x_t.requires_grad_()

        def predict() -> Tensor:
            if guided:
                return torch.stack(self._pair(condition, count)(x_t, sigma)).sum(0)
            return self.family.denoiser(self._network, TEACHER, condition)(x_t, sigma)

        def carry(held: list[Tensor]) -> None:  # other rewards follow, so the graph stays
            torch.autograd.grad(held[0], x_t, torch.ones_like(held[0]), retain_graph=True)

        self._run_blocks_again(checkpointing)
        return _tape(self._mode, predict, carry)

    # ---- The VAE's, in bytes ------------------------------------------------------------------------------------

    def decode(self, count: int, slicing: bool, tiling: bool) -> int:
        """Return the peak of decoding `count` latents, without gradients."""
        self._part_vae(slicing, tiling)
        latents = self._latents(count)
        return _peak(LikeCuda(), lambda: self.family.decode(latents))

    def differentiate(self, count: int, slicing: bool, tiling: bool) -> Tape:
        """Return what decoding `count` latents takes whose images rewards differentiate."""
        self._part_vae(slicing, tiling)
        latents = self._latents(count).requires_grad_()
        return _tape(
            LikeCuda(),
            lambda: self.family.decode(latents),
            lambda held: torch.autograd.grad(held[0], latents, torch.zeros_like(held[0])),
        )

    def encode(self, count: int, slicing: bool, tiling: bool) -> int:
        """Return the peak of encoding `count` images."""
        self._part_vae(slicing, tiling)
        with LikeCuda(), torch.no_grad():
            images = self.family.decode(self._latents(count))
        return _peak(LikeCuda(), lambda: self.family.encode_images(images))

    # ---- How they are run ---------------------------------------------------------------------------------------

    def _latents(self, count: int) -> Tensor:
        return torch.zeros(count, *self.shape, device=self.family.device)

    def _inputs(self, count: int) -> tuple[Condition, Tensor, Tensor]:
        """Return a condition, x_t `[count, *x]` and noise levels `[count]`."""
        return self.condition(count), self._latents(count), torch.full((count,), 0.5, device=self.family.device)

    def _denoiser(self, role: str, condition: Condition) -> Denoiser:
        """Return a role's denoiser; a critic that is told the student's step is told it."""
        count = next(iter(condition.values())).shape[0]
        steps = torch.zeros(count, dtype=torch.long, device=self.family.device)
        return self.family.denoiser(self._network, role, self.family.roles.tell(role, condition, steps))

    def _pair(self, condition: Condition, count: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return self.family.denoiser_pair(self._network, TEACHER, condition, self.condition(count))

    def _network(self, role: str, **inputs: Any) -> Tensor:
        """Run the backbone as `Roles` does, but for its autocast, which knows no meta device."""
        roles = self.family.roles
        with roles.use(role), self._mode.one_forward():
            output: Tensor = dict(roles.copies.items()).get(role, roles.backbone)(**inputs, return_dict=False)[0]
        return output

    def _run_blocks_again(self, checkpointing: bool) -> None:
        """Switch gradient checkpointing on or off; raises `ModelError` if the backbone has none."""
        roles = self.family.roles
        if checkpointing:
            roles.gradient_checkpointing_enable()
            return
        networks: list[Any] = [roles.backbone, *roles.copies.values()]
        for network in networks:
            network.disable_gradient_checkpointing()

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        forward, replay = Roles._checkpoint_contexts(self.family.roles)
        return forward, self._with_mode(replay)

    @contextmanager
    def _with_mode(self, replay: AbstractContextManager[None]) -> Iterator[None]:
        """Switch the mode on for the replay of a block, which PyTorch runs outside of all modes."""
        with self._mode, replay:
            yield

    def _part_vae(self, slicing: bool, tiling: bool) -> None:
        """Let the VAE work in slices, in tiles or on the whole; raises `ConfigError` if it cannot."""
        vae = self.family.pipeline.vae
        vae.use_slicing = vae.use_tiling = False
        part_vae(self.family, slicing, tiling)


def _peak(mode: LikeCuda, run: Callable[[], object]) -> int:
    """Return the most bytes that are alive at once while `run` makes them, without gradients."""
    with mode, (meter := Meter()), torch.no_grad():
        run()
    return meter.peak


def _tape(
    mode: LikeCuda, forward: Callable[[], Tensor], backward: Callable[[list[Tensor]], object], times: int = 1
) -> Tape:
    """Return what a forward and a backward pass take, the last of `times` of them.

    `backward` gets the output in a list, out of which it can take it, so that nothing else holds it.
    """
    with mode, (meter := Meter()):
        for _ in range(times):
            there = meter.peak = meter.live
            held = [forward()]
            kept, most = meter.live, meter.peak
            meter.peak = meter.live
            backward(held)
            held.clear()
    return Tape(kept - there, most - there, meter.peak - there)
