"""Few-step rollouts: the re-noising sampler on exactly the inference grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rdm_sdk.core.noise import NoiseSchedule
from rdm_sdk.core.transitions import Transition, renoising_transition, step
from rdm_sdk.types import Denoiser, Rollout


def transition_to(schedule: NoiseSchedule, x_0: Tensor, sigmas: Sequence[float], steps: Tensor) -> Transition:
    """Return the transition out of step k to the next noise level for `x_0` `[N, *x]` and `steps` k, int64 `[N]`.

    The last step leads to noise level 0: its transition is deterministic and has no density.
    """
    levels = torch.tensor([*sigmas[1:], 0.0], dtype=torch.float32, device=x_0.device)
    return renoising_transition(schedule, x_0, levels[steps])


@torch.no_grad()
def sample(student: Denoiser, noise: Tensor, sigmas: Sequence[float], schedule: NoiseSchedule) -> Tensor:
    """Run all steps from `noise` `[N, *x]` and return the endpoints x_0 `[N, *x]`; draws from the global generator."""
    state, x_0 = noise, noise
    for k, sigma in enumerate(sigmas):
        x_0 = student(state, noise.new_full((len(noise),), sigma))
        if k + 1 < len(sigmas):
            steps = torch.full((len(noise),), k, device=noise.device)
            state = step(transition_to(schedule, x_0, sigmas, steps), torch.randn_like(x_0))
    return x_0


@torch.no_grad()
def rollout(
    student_of: Callable[[Tensor], Denoiser],
    noise: Tensor,
    steps: Tensor,
    sigmas: Sequence[float],
    schedule: NoiseSchedule,
    finish: bool = False,
) -> Rollout:
    """Simulate the student from noise up to each sample's stop step (DMD2's backward simulation, arXiv 2405.14867).

    Args:
        student_of: rows (int64 `[n]`) to the student's denoiser for the prompts of those rows, so that only samples
            still on their way are computed.
        noise: `[N, *x]`.
        steps: each sample's stop step k in [0, K), int64 `[N]`.
        sigmas: the grid, K noise levels, largest first.
        schedule: the model's noise schedule.
        finish: go on to the end of each trajectory (scored rewards judge endpoints), keeping what the stop step led to.
    """
    state, x_0, final = noise.clone(), torch.empty_like(noise), torch.empty_like(noise)
    states, next_states = noise.clone(), torch.empty_like(noise)
    for k, sigma in enumerate(sigmas):
        rows = torch.arange(len(noise), device=noise.device) if finish else (steps >= k).nonzero()[:, 0]
        if not len(rows):
            break
        predicted = student_of(rows)(state[rows], noise.new_full((len(rows),), sigma))
        following = transition_to(schedule, predicted, sigmas, torch.full_like(rows, k))
        stopped = steps[rows] == k
        here = rows[stopped]
        states[here], x_0[here] = state[here], predicted[stopped]
        state[rows] = step(following, torch.randn_like(predicted))
        next_states[here] = state[here]
        final[rows] = predicted
    return Rollout(states, steps, x_0, next_states if finish else None, final if finish else None)


def draw_steps(num_groups: int, group_size: int, num_steps: int, device: torch.device) -> Tensor:
    """Draw a stop step per group, int64 `[N]`: uniform in [0, num_steps), spread evenly over the groups."""
    offset = torch.randint(num_steps, (), device=device)
    spread = (torch.arange(num_groups, device=device) + offset) % num_steps
    return spread[torch.randperm(num_groups, device=device)].repeat_interleave(group_size)
