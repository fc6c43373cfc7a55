"""What model-aware rewards see of a run: its noise levels, its denoisers, and evaluations that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rdm_sdk.errors import RewardError
from rdm_sdk.method.draws import Draws, Spread, draw_uniform
from rdm_sdk.method.matching import (
    across,
    critic_lag,
    lag_profile,
    matching_gradient,
    matching_score,
    residual_magnitude,
)
from rdm_sdk.method.noise import NoiseSchedule, add_noise
from rdm_sdk.method.tilting import posterior_covariance
from rdm_sdk.method.transitions import ode_transition
from rdm_sdk.types import Denoiser, RewardOutput

TEACHER = "teacher"

Times = tuple[Tensor | float, Tensor | float]
"""The lowest and the highest time (`NoiseSchedule`) of re-noising, each `[N]` or one for all samples."""


def _no_encoder(images: Tensor) -> Tensor:
    raise RewardError("this batch has no model that could encode images")


def _no_head(role: str) -> nn.Module:
    raise RewardError(f"this batch has no run that trains {role!r}")


@dataclass(frozen=True)
class Origin:
    """Where the student predicted samples from."""

    states: Tensor
    """x_k `[N, *x]`, what it saw."""
    levels: Tensor
    """Their noise levels, `[N]`."""
    steps_left: Tensor
    """How many of its steps come after the one that made each sample, int64 `[N]`: 0 for the last."""
    teacher_of: Callable[[Tensor], Denoiser]
    """Rows (int64 `[n]`) to the teacher's denoiser for the prompts of those rows, guided as the run says."""


@dataclass(frozen=True, kw_only=True)
class DiffusionContext:
    """The run's models for the prompts of one batch."""

    schedule: NoiseSchedule
    denoiser: Callable[[str], Denoiser]
    """Role name ("teacher", "student", "fake", ...) to a denoiser with the batch's prompts closed over. The teacher's
    is guided as the run says; parameters get gradients only of the role that is being trained."""
    min_time: Tensor | float
    """From which time on samples are re-noised for the student's update (`NoiseSchedule`), `[N]` or one for all."""
    max_time: Tensor | float
    """And up to which."""
    spread: Spread = "stratified"
    """How times are spread over a group."""
    on_path: bool = False
    """Whether samples get the noise that the student's state had, in the place of fresh noise. A deterministic step
    leads straight to the next state, so with levels between the two they lie on its way."""
    critic_correction: Literal["others", "none"] = "none"
    """Whether the critic's lag, as the others of a sample's group show it, is taken out of `dm`'s gradient."""
    guide: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """`(x_t, sigma, x_0 with the prompt, x_0 without) -> guided x_0` as the run says; None where nothing guides."""
    denoiser_pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """The teacher with and without the prompt, from one pass; None where nothing guides."""
    features: Callable[[Tensor, Tensor], Tensor] | None = None
    """`(x_t, sigma) -> [N, tokens, width]`: what the teacher's middle block says, differentiable in `x_t`."""
    encode_images: Callable[[Tensor], Tensor] = _no_encoder
    """RGB images `[N, 3, H, W]` in [0, 1] to latents `[N, *x]`."""
    head: Callable[[str], nn.Module] = _no_head
    """Role name to the module that a reward made for it (`Reward.make_head`), as the run trains it."""
    unprompted: Denoiser | None = None
    """The teacher without the prompt alone."""
    critic_times: Times = (0.0, 1.0)
    """The times that critics learn at."""
    steps: Tensor | None = None
    """The student's step that made each sample, int64 `[N]`, where critics are told it; None where they are not."""
    origin: Origin | None = None
    """Where the student predicted the samples from; None of samples that were not predicted in a run."""
    carries_back: bool = False
    """Whether the teacher's predictions keep their graph, so that `Renoised.carry_back` works."""
    draws: Draws = field(default_factory=Draws)
    """Where random numbers come from. On several processes each is drawn for the samples of all, so all have to ask for
    as many, in the same order."""
    _drawn: list[tuple[Tensor, Renoised]] = field(default_factory=list, init=False, repr=False, compare=False)
    """The latest samples that were re-noised, with what they became."""

    def draw_sigma(self, count: int, group_size: int, device: torch.device) -> Tensor:
        """Draw noise levels `[N]` for the student's update, their times spread over groups as the run says."""
        return self._draw(count, group_size, (self.min_time, self.max_time), device)

    def draw_critic_sigma(self, count: int, device: torch.device) -> Tensor:
        """Draw noise levels `[N]` for a critic's update."""
        return self._draw(count, 1, self.critic_times, device)

    def _draw(self, count: int, group_size: int, times: Times, device: torch.device) -> Tensor:
        draws = self.draws
        groups = draws.count * count // group_size
        uniform = draws.mine(draw_uniform(self.spread, groups, group_size, device, draws.generator))
        ends = (torch.as_tensor(end, dtype=uniform.dtype, device=device).expand(count) for end in times)
        return self.schedule.levels(uniform, *ends)

    def add_noise(self, x_0: Tensor, sigma: Tensor) -> Tensor:
        """Return x_t `[N, *x]` for `x_0` `[N, *x]` at noise levels `[N]`, with fresh noise, in float32 or more."""
        # Whatever x_0 is in, because some versions of PyTorch draw other numbers in bfloat16.
        return add_noise(self.schedule, x_0, self.draws.normal(len(x_0), x_0.shape[1:], x_0.device), sigma)

    def renoise(self, x_0: Tensor, group_size: int) -> Renoised:
        """Return the batch re-noised at a level of its own per sample; the same to every reward that asks.

        Rewards of one batch thus see the same noise, and what a network says of it is computed once for all of them.

        Raises:
            RewardError: the noise shall be that of the student's states (`on_path`), and none are known.
        """
        if not self._drawn or self._drawn[0][0] is not x_0:
            sigma = self.draw_sigma(len(x_0), group_size, x_0.device)
            # A copy, which keeps nothing drawn: a cycle would keep the teacher's graph until some garbage collection.
            x_t = self._on_the_way(x_0, sigma) if self.on_path else self.add_noise(x_0, sigma)
            self._drawn[:] = [(x_0, Renoised(replace(self), x_t, sigma))]
        return self._drawn[0][1]

    def _on_the_way(self, x_0: Tensor, sigma: Tensor) -> Tensor:
        """Return where a deterministic step from the student's states leads at noise levels `[N]`, `[N, *x]`."""
        if self.origin is None:
            raise RewardError("no state is known that the student predicted these samples from; only a run's have one")
        return ode_transition(self.schedule, self.origin.states, x_0, self.origin.levels, sigma).mean


class Renoised:
    """A batch's samples re-noised, with what the networks predict from them."""

    def __init__(self, context: DiffusionContext, x_t: Tensor, sigma: Tensor) -> None:
        self.x_t = x_t
        """`[N, *x]`."""
        self.sigma = sigma
        """`[N]`."""
        self._context = context
        self._seen = x_t.detach().requires_grad_() if context.carries_back else x_t  # by the teacher
        self._predicted: dict[str, Tensor] = {}
        """Role to its prediction of x_0; the teacher's is that with the prompt, not guided where `guide` does it."""
        self._unprompted: Tensor | None = None
        """The teacher's prediction without the prompt."""

    def x_0(self, role: str) -> Tensor:
        """Return a role's prediction of x_0 `[N, *x]`, detached; the teacher's is guided as the run says."""
        if role == TEACHER:
            return self._teacher().detach()
        return self._predict(role, self.x_t)

    def teacher_pair(self) -> tuple[Tensor, Tensor]:
        """Return the teacher's x_0 with and without the prompt, each `[N, *x]`, detached."""
        with_prompt, without = self._pair()
        return with_prompt.detach(), without.detach()

    def carry_back(self, vector: Tensor) -> Tensor:
        """Return Cov(x_0 | x_t) times a vector per sample, `[N, *x]`, as the teacher's Jacobian shows it.

        It takes a backward pass through the teacher and no forward pass that another reward has asked for.

        Raises:
            RewardError: the batch was made without `carries_back`.
        """
        if not self._context.carries_back:
            raise RewardError("this batch keeps no graph of the teacher to carry gradients back through")
        with torch.enable_grad():
            predicted = self._teacher()
        (pulled,) = torch.autograd.grad(predicted, self._seen, vector, retain_graph=True)
        return posterior_covariance(self._context.schedule, pulled, self.sigma)

    def _predict(self, role: str, x_t: Tensor) -> Tensor:
        if role not in self._predicted:
            self._predicted[role] = self._context.denoiser(role)(x_t, self.sigma)
        return self._predicted[role]

    def _teacher(self) -> Tensor:
        """Return the teacher's prediction of x_0, guided as the run says, with its graph where the run keeps it."""
        if self._context.guide is not None:
            return self._context.guide(self._seen, self.sigma, *self._pair())
        return self._predict(TEACHER, self._seen)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return the teacher's prediction with and without the prompt, asking for what is missing alone."""
        context = self._context
        if self._unprompted is None:
            if TEACHER in self._predicted and context.unprompted is not None:
                self._unprompted = context.unprompted(self._seen, self.sigma)
            elif context.denoiser_pair is not None:
                self._predicted[TEACHER], self._unprompted = context.denoiser_pair(self._seen, self.sigma)
            else:
                raise RewardError("this batch has no teacher without the prompt; guidance needs one")
        return self._predicted[TEACHER], self._unprompted


def contrast(
    context: DiffusionContext,
    x_0: Tensor,
    group_size: int,
    pair: Callable[[Renoised], tuple[Tensor, Tensor]],
    correction: Literal["others", "none"] = "none",
    projected: bool = False,
) -> RewardOutput:
    """Return the reward log p(x_0) - log q(x_0) of two denoisers, as the re-noised batch shows it.

    `pair` gives the two predictions of x_0. The gradient is their difference, the score the half log-SNR
    integral of the difference of their squared errors, and the magnitude mean |x_0 - D_p|. Unless `correction` is
    "none", the lag of q behind the samples (`critic_lag`) is added to its prediction before the gradient
    is taken. Of a `projected` gradient the part along x_0 - D_q is taken away (`across`).
    """
    renoised = context.renoise(x_0, group_size)
    toward, away = pair(renoised)
    span = context.max_time - context.min_time
    scores = matching_score(context.schedule, x_0, toward, away, renoised.sigma, span)
    residual = x_0 - away
    if correction != "none":
        profile = lag_profile(context.schedule, renoised.sigma)
        away = away + critic_lag(residual, profile, group_size)
    gradient = matching_gradient(toward, away)
    return RewardOutput(scores, across(gradient, residual) if projected else gradient, residual_magnitude(x_0, toward))
