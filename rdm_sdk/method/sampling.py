"""The student as a few-step policy: sampling, rollouts that can be learned from, and how likely they still are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rdm_sdk.method.draws import Draws
from rdm_sdk.method.importance import log_ratio
from rdm_sdk.method.noise import NoiseSchedule
from rdm_sdk.method.transitions import TRANSITIONS, Reduction, Transition, TransitionKind, ode_transition, step
from rdm_sdk.types import Denoiser, Rollout, select_steps, sent

StudentOf = Callable[[Tensor], Denoiser]
"""Rows (int64 `[n]`) to the student's denoiser for the prompts of those rows."""


@dataclass(frozen=True)
class FewStepPolicy:
    """How a student's predictions become the next state, on exactly the inference grid."""

    schedule: NoiseSchedule
    sigmas: tuple[float, ...]
    """The grid: K noise levels, largest first, without the final zero."""
    kind: TransitionKind = "renoise"
    eta: float = 1.0
    """Share of fresh noise for "cps" (in [0, 1]), noise rate for "sde"; the others have none."""

    @property
    def num_steps(self) -> int:
        return len(self.sigmas)

    @property
    def num_random_steps(self) -> int:
        """How many of the first steps have a density."""
        deterministic = self.kind == "ode" or (self.kind != "renoise" and self.eta == 0)
        return 0 if deterministic else self.num_steps - 1

    def levels(self, steps: Tensor) -> Tensor:
        """Return the noise levels `[N]` at steps k, int64 `[N]` in [0, K]; level K is 0."""
        return _grid(self.sigmas, steps.device)[steps]

    def times(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times `[N]` of the levels that steps k (int64 `[N]`) lead to and start from."""
        return self.schedule.time(self.levels(steps + 1)), self.schedule.time(self.levels(steps))

    def step_weights(self, steps: Tensor) -> Tensor:
        """Return by how much samples of steps k (int64 `[N]`) count where each step is matched by itself, `[N]`.

        A flow's x_0 moves by sigma times what its prediction moves, so the step at 0.25 pulls the network a quarter as
        hard as the one at 1, and what early steps change there is not made good. Weights of 1 / sigma (the root of the
        schedule's `loss_weight`; 1 on average over the grid) let all steps pull alike. They move no step's optimum, as
        weights of the mixture's steps would.
        """
        grid = torch.arange(self.num_steps, device=steps.device)
        weights = self.schedule.loss_weight(self.levels(grid)).sqrt()
        return (weights / weights.mean())[steps]

    def transition(self, x_t: Tensor, x_0: Tensor, steps: Tensor) -> Transition:
        """Return the transition out of steps k (int64 `[N]`) for states and predictions `[N, *x]`."""
        rule = TRANSITIONS[self.kind]
        return rule(self.schedule, x_t, x_0, self.levels(steps), self.levels(steps + 1), self.eta)

    def inference(self) -> FewStepPolicy:
        """Return the sampler of the trained student in plain diffusers.

        Re-noising stays as it is. The noise of "sde" and "cps" only explores during training, as in Flow-GRPO; their
        students are sampled by the deterministic step.
        """
        return self if self.kind == "renoise" else replace(self, kind="ode")


@torch.no_grad()
def sample(student: Denoiser, noise: Tensor, policy: FewStepPolicy) -> Tensor:
    """Run all steps from `noise` `[N, *x]` and return the endpoints x_0 `[N, *x]`; draws from the global generator."""
    *_, endpoints = sample_each_step(student, noise, policy)
    return endpoints


@torch.no_grad()
def sample_each_step(student: Denoiser, noise: Tensor, policy: FewStepPolicy) -> Iterator[Tensor]:
    """Run all steps from `noise` `[N, *x]` and yield x_0 `[N, *x]` after each; draws from the global generator."""
    state = noise
    for k in range(policy.num_steps):
        steps = torch.full((len(noise),), k, device=noise.device)
        x_0 = student(state, policy.levels(steps))
        yield x_0
        if k + 1 < policy.num_steps:
            transition = policy.transition(state, x_0, steps)
            state = transition.mean if policy.kind == "ode" else step(transition, torch.randn_like(x_0))


@torch.no_grad()
def follow_flow(denoiser: Denoiser, schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor, num_steps: int) -> Tensor:
    """Return where a denoiser's probability-flow ODE (arXiv 2011.13456) leads from `x_t`: x_0 `[N, *x]`.

    Deterministic steps (DDIM's, Euler's on a rectified flow) to levels whose times lie evenly between that of `sigma`
    `[N]` and 0, `num_steps` evaluations of the denoiser in all; one of them alone is its prediction at `x_t`.
    """
    time, level = schedule.time(sigma), sigma
    for k in range(1, num_steps + 1):
        share = torch.full_like(sigma, 1 - k / num_steps)
        lower = schedule.levels(share, torch.zeros_like(time), time) if k < num_steps else torch.zeros_like(sigma)
        x_t = ode_transition(schedule, x_t, denoiser(x_t, level), level, lower).mean
        level = lower
    return x_t


@torch.no_grad()
def rollout(
    student_of: StudentOf, noise: Tensor, depths: Tensor, policy: FewStepPolicy, draws: Draws | None = None
) -> Rollout:
    """Simulate the student from noise (DMD2's backward simulation, arXiv 2405.14867), each sample to its own depth.

    Args:
        student_of: only samples still on their way are computed.
        noise: `[N, *x]`.
        depths: how many steps each sample takes, int64 `[N]` in [0, K]; with `draws`, the samples of all processes.
        policy: the sampler.
        draws: this process's share of the random numbers; by default there is one process.
    """
    draws = Draws() if draws is None else draws
    mine = draws.mine(depths)
    states = noise.new_zeros(policy.num_steps, *noise.shape)
    x_0 = torch.zeros_like(states)
    states[0] = noise
    known = depths.cpu()  # at once: whoever asks the device at every step waits for it at every step
    for k in range(int(known.max())):
        more = k + 1 < policy.num_steps
        rows, fresh = draws.normal_for(known > k, noise.shape[1:] if more else (0,), noise.dtype, noise.device)
        if not len(rows):  # those of other processes go on
            continue
        steps = torch.full_like(rows, k)
        predicted = student_of(rows)(states[k, rows], policy.levels(steps))
        x_0[k, rows] = predicted
        if more:
            states[k + 1, rows] = step(policy.transition(states[k, rows], predicted, steps), fresh)
    return Rollout(states, x_0, mine)


@torch.no_grad()
def redraw(done: Rollout, x_0: Tensor, steps: Tensor, policy: FewStepPolicy, draws: Draws | None = None) -> None:
    """Let trajectories go on from what the student says now: in place, x_0 at steps k and the state after it.

    `x_0` `[N, *x]` is its prediction at the stored states of steps k (`[N]`; with `draws`, of all processes' samples,
    whose share of the random numbers this process takes). What follows a redrawn state is still an
    older student's; who visits the steps in order draws each of them anew before it counts.
    """
    draws = Draws() if draws is None else draws
    mine = draws.mine(steps)
    done.x_0[mine, torch.arange(len(mine), device=mine.device)] = x_0
    rows, fresh = draws.normal_for(steps + 1 < policy.num_steps, x_0.shape[1:], x_0.dtype, x_0.device)
    at = mine[rows]
    transition = policy.transition(done.states[at, rows], x_0[rows], at)
    done.states[at + 1, rows] = step(transition, fresh)


@torch.no_grad()
def state_log_ratio(
    student_of: StudentOf, done: Rollout, steps: Tensor, policy: FewStepPolicy, reduction: Reduction
) -> Tensor:
    """Return log pi_new / pi_old `[N]` of the stored transitions that led each sample to its state at steps k (`[N]`).

    The student as it is now is evaluated at every state before k; a sample at step 0 has had no transition, so its
    log-ratio is exactly 0. `reduction` is over the dimensions of one transition; transitions always add up.

    Raises:
        ValueError: a state before step k was left by a transition without a density.
    """
    total, known = torch.zeros(len(steps), device=done.states.device), steps.cpu()
    last = int(known.max())
    _check_density(policy, last)
    for k in range(last):
        rows = sent((known > k).nonzero()[:, 0], steps.device)
        at = torch.full_like(rows, k)
        state = done.states[k, rows]
        now = policy.transition(state, student_of(rows)(state, policy.levels(at)), at)
        then = policy.transition(state, done.x_0[k, rows], at)
        total[rows] += log_ratio(now, then, done.states[k + 1, rows], reduction)
    return total


def replay_log_ratio(
    done: Rollout, x_0: Tensor, rows: Tensor, steps: Tensor, policy: FewStepPolicy, reduction: Reduction
) -> Tensor:
    """Return log pi_new / pi_old `[n]` of the stored transitions out of steps k (`[n]`) of the given rows (`[n]`).

    `x_0` `[n, *x]` is the student's prediction there now; the result is differentiable in it.

    Raises:
        ValueError: a step is the last, or the sampler is deterministic: no density.
    """
    if len(steps):
        _check_density(policy, int(steps.max()) + 1)
    state, then = select_steps(done.states, steps, rows), select_steps(done.x_0, steps, rows)
    new, old = (policy.transition(state, prediction, steps) for prediction in (x_0, then))
    return log_ratio(new, old, select_steps(done.states, steps + 1, rows), reduction)


def _check_density(policy: FewStepPolicy, count: int) -> None:
    """Raise `ValueError` unless the first `count` steps have a density."""
    if count > policy.num_random_steps:
        raise ValueError(
            f"step {count - 1} of {policy.kind!r} has no density, and so no ratio: only the first "
            f"{policy.num_random_steps} of its {policy.num_steps} have one"
        )


@lru_cache(maxsize=64)
def _grid(sigmas: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a grid's noise levels on a device, with the final zero: made once, because making it waits for it."""
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)


def plan_steps(first: Tensor, num_iterations: int, num_steps: int) -> Tensor:
    """Return the step that each sample is trained at in each use of its rollout, int64 `[num_iterations, N]`.

    From the first use's steps (int64 `[N]`), each further use takes the next step of the grid, around and around:
    over K uses every group visits every step, while the steps stay spread evenly over the groups.
    """
    return (first + torch.arange(num_iterations, device=first.device)[:, None]) % num_steps
