"""Few-step rollouts against an independent simulation, one sample and one step at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdm_sdk.core.noise import FlowSchedule
from rdm_sdk.digits import teacher_path
from rdm_sdk.models.load import load_adapter
from rdm_sdk.sampling import draw_steps, rollout, sample, transition_to
from rdm_sdk.types import Denoiser

SIGMAS = [1.0, 0.75, 0.5, 0.25]
FLOW = FlowSchedule()


def halving(x_t: Tensor, sigma: Tensor) -> Tensor:
    """A made-up student whose answer depends on state and noise level."""
    return 0.5 * x_t + sigma[:, None]


def student_of(rows: Tensor) -> Denoiser:
    """A made-up student whose answer also depends on the row, as prompts make it."""
    return lambda x_t, sigma: halving(x_t, sigma) + 10.0 * rows[:, None]


def by_hand(noise: Tensor, steps: Tensor, finish: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Simulate step by step with scalars' arithmetic; returns states, x_0, next states and endpoints."""
    n, dim = noise.shape
    state = noise.clone()
    states, x_0, following, final = (torch.full_like(noise, torch.nan) for _ in range(4))
    for k, sigma in enumerate(SIGMAS):
        going = [i for i in range(n) if finish or steps[i] >= k]
        if not going:
            break
        eps = torch.randn(len(going), dim)
        level = SIGMAS[k + 1] if k + 1 < len(SIGMAS) else 0.0
        for j, i in enumerate(going):
            prediction = 0.5 * state[i] + sigma + 10.0 * i
            after = (1 - level) * prediction + level * eps[j]
            if steps[i] == k:
                states[i], x_0[i], following[i] = state[i], prediction, after
            state[i] = after
            final[i] = prediction
    return states, x_0, following, final


@pytest.mark.parametrize("finish", [False, True])
def test_rollout_equals_a_simulation_by_hand(finish: bool) -> None:
    """States, predictions, next states and endpoints are those of the step-by-step simulation."""
    steps = torch.tensor([0, 3, 1, 2, 3])
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    got = rollout(student_of, noise, steps, SIGMAS, FLOW, finish=finish)
    torch.manual_seed(1)
    states, x_0, following, final = by_hand(noise, steps, finish)
    torch.testing.assert_close(got.states, states)
    torch.testing.assert_close(got.x_0, x_0)
    assert torch.equal(got.steps, steps)
    if finish:
        assert got.next_states is not None
        assert got.final is not None
        torch.testing.assert_close(got.next_states, following)
        torch.testing.assert_close(got.final, final)
        torch.testing.assert_close(got.final[1], got.x_0[1])  # stopped at the last step: the endpoint
        torch.testing.assert_close(got.next_states[1], got.x_0[1])  # which is reached without noise
    else:
        assert got.next_states is None
        assert got.final is None


def test_rollout_computes_only_samples_still_on_their_way() -> None:
    """Without `finish`, a sample costs exactly its stop step plus one evaluations; with it, all K."""
    calls: list[int] = []

    def counting(rows: Tensor) -> Denoiser:
        calls.append(len(rows))
        return student_of(rows)

    noise, steps = torch.zeros(4, 2), torch.tensor([0, 1, 1, 2])
    rollout(counting, noise, steps, SIGMAS, FLOW)
    assert calls == [4, 3, 1]
    calls.clear()
    rollout(counting, noise, steps, SIGMAS, FLOW, finish=True)
    assert calls == [4, 4, 4, 4]


def test_sample_is_the_rollout_that_stops_at_the_end() -> None:
    """Sampling and simulating to the last step draw the same noise and end at the same place."""
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    endpoints = sample(halving, noise, SIGMAS, FLOW)
    torch.manual_seed(2)
    got = rollout(lambda rows: halving, noise, torch.full((4,), 3), SIGMAS, FLOW)
    assert torch.equal(got.x_0, endpoints)
    one_step = sample(halving, noise, [1.0], FLOW)
    assert torch.equal(one_step, halving(noise, torch.ones(4)))


def test_rollout_carries_no_gradient_and_keeps_its_input() -> None:
    """A rollout is data: no graph, and the noise given is not written to."""
    weight = torch.ones((), requires_grad=True)
    noise = torch.ones(2, 3)
    got = rollout(lambda rows: lambda x_t, sigma: weight * x_t, noise, torch.tensor([0, 2]), SIGMAS, FLOW)
    assert not got.x_0.requires_grad
    assert torch.equal(noise, torch.ones(2, 3))


def test_transition_to_the_next_level() -> None:
    """Each step leads to the next noise level of the grid, the last to 0, where the transition has no spread."""
    transition = transition_to(FLOW, torch.ones(4, 1), SIGMAS, torch.arange(4))
    assert transition.std.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert transition.mean[:, 0].tolist() == [0.25, 0.5, 0.75, 1.0]


def test_draw_steps_is_whole_groups_and_evenly_spread() -> None:
    """All samples of a group stop at one step; K groups cover all K steps; each step comes equally often."""
    torch.manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(200):
        steps = draw_steps(4, 3, 4, torch.device("cpu")).reshape(4, 3)
        assert bool((steps == steps[:, :1]).all())
        assert sorted(steps[:, 0].tolist()) == [0, 1, 2, 3]
        counts[steps[0, 0]] += 1
    assert counts.min() > 30
    single = torch.stack([draw_steps(1, 1, 4, torch.device("cpu"))[0] for _ in range(400)])
    assert torch.bincount(single, minlength=4).min() > 60


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        (4, 1.0, [1.0, 0.75, 0.5, 0.25]),
        (4, None, [1.0, 0.75, 0.5, 0.25]),
        (2, 1.0, [1.0, 0.5]),
        (1, 1.0, [1.0]),
        # Shift s maps a level u to s u / (1 + (s - 1) u); the last level is exact, those between are stretched.
        (2, 3.0, [1.0, 0.75]),
    ],
)
def test_the_grid_of_the_embedded_teacher(steps: int, shift: float | None, expected: list[float]) -> None:
    """K equal steps down from pure noise, and no step wasted next to zero."""
    adapter = load_adapter(teacher_path(), torch.float32)
    assert adapter.student_sigmas(steps, shift) == pytest.approx(expected, abs=1e-6)
