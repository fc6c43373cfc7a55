"""Few-step rollouts against an independent simulation, one sample and one step at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_sdk.digits import teacher_path
from rdm_sdk.families.load import load_family
from rdm_sdk.method.draws import draw_steps
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule
from rdm_sdk.method.sampling import FewStepPolicy, plan_steps, redraw, replay_log_ratio, rollout, sample
from rdm_sdk.method.transitions import TransitionKind
from rdm_sdk.types import Denoiser, Rollout, select, select_steps

SIGMAS = (1.0, 0.75, 0.5, 0.25)
FLOW, VP = FlowSchedule(), VariancePreservingSchedule()
RENOISE = FewStepPolicy(FLOW, SIGMAS)
POLICIES = {
    "renoise": RENOISE,
    "cps": FewStepPolicy(FLOW, SIGMAS, "cps", 0.6),
    "sde": FewStepPolicy(FLOW, SIGMAS, "sde", 0.7),
    "ode": FewStepPolicy(FLOW, SIGMAS, "ode"),
    "cps-vp": FewStepPolicy(VP, SIGMAS, "cps", 0.6),
}
by_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def halving(x_t: Tensor, sigma: Tensor) -> Tensor:
    """A made-up student whose answer depends on state and noise level."""
    return 0.5 * x_t + sigma[:, None]


def student_of(rows: Tensor) -> Denoiser:
    """A made-up student whose answer also depends on the row, as prompts make it."""
    return lambda x_t, sigma: halving(x_t, sigma) + 10.0 * rows[:, None]


def by_hand(noise: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    """Simulate re-noising step by step with scalars' arithmetic; returns states and predictions."""
    n, dim = noise.shape
    states, x_0 = torch.zeros(4, n, dim), torch.zeros(4, n, dim)
    states[0] = noise
    for k, sigma in enumerate(SIGMAS):
        going = [i for i in range(n) if depths[i] > k]
        for i in going:
            x_0[k, i] = 0.5 * states[k, i] + sigma + 10.0 * i
        if k < 3 and going:
            level = SIGMAS[k + 1]
            for i, eps in zip(going, torch.randn(len(going), dim), strict=True):
                states[k + 1, i] = (1 - level) * x_0[k, i] + level * eps
    return states, x_0


@pytest.mark.parametrize("depths", [[1, 4, 2, 3, 4], [4] * 5, [1] * 5, [2, 1, 2, 2, 1]], ids=str)
def test_rollout_equals_a_simulation_by_hand(depths: list[int]) -> None:
    """States and predictions are those of the step-by-step simulation, and zero beyond what was simulated."""
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    got = rollout(student_of, noise, torch.tensor(depths), RENOISE)
    torch.manual_seed(1)
    states, x_0 = by_hand(noise, torch.tensor(depths))
    torch.testing.assert_close(got.states, states)
    torch.testing.assert_close(got.x_0, x_0)
    assert got.depths.tolist() == depths
    for i, depth in enumerate(depths):
        assert (got.x_0[:depth, i] != 0).all()
        assert (got.x_0[depth:, i] == 0).all()
        assert (got.states[depth + 1 :, i] == 0).all()


@by_policy
def test_redrawn_states_come_from_what_the_student_says_now(policy: FewStepPolicy) -> None:
    """In place: x_0 at each sample's own step, the state after it from a fresh draw, and nothing else."""
    done = rollout(student_of, torch.randn(5, 3), torch.full((5,), 4), policy)
    states, x_0, steps = done.states.clone(), done.x_0.clone(), torch.tensor([0, 3, 1, 2, 2])
    now = torch.randn(5, 3)
    torch.manual_seed(1)
    redraw(done, now, steps, policy)
    torch.manual_seed(1)
    eps = dict(zip((0, 2, 3, 4), torch.randn(4, 3), strict=True))  # the second sample is at its last step
    for i, k in enumerate(steps.tolist()):
        x_0[k, i] = now[i]
        if k < 3:
            transition = policy.transition(states[k, i : i + 1], now[i : i + 1], steps[i : i + 1])
            states[k + 1, i] = transition.mean[0] + transition.std[0] * eps[i]
    torch.testing.assert_close(done.states, states)
    assert torch.equal(done.x_0, x_0)


@by_policy
def test_each_state_was_drawn_from_the_transition_before(policy: FewStepPolicy) -> None:
    """x_{k+1} is mean + std eps of the transition out of x_k, with eps fresh from the generator."""
    depths, noise = torch.tensor([1, 4, 2, 3, 4]), torch.randn(5, 3)
    torch.manual_seed(1)
    got = rollout(student_of, noise, depths, policy)
    torch.manual_seed(1)
    for k in range(3):
        for i, eps in zip((depths > k).nonzero()[:, 0], torch.randn(int((depths > k).sum()), 3), strict=True):
            state, at = got.states[k, i][None], torch.tensor([k])
            x_0 = student_of(i[None])(state, torch.tensor([SIGMAS[k]]))
            torch.testing.assert_close(got.x_0[k, i], x_0[0])
            transition = policy.transition(state, x_0, at)
            torch.testing.assert_close(got.states[k + 1, i], transition.mean[0] + transition.std * eps)
    assert (got.x_0[3, [1, 4]] != 0).all()


def test_rollout_computes_only_samples_still_on_their_way() -> None:
    """A sample costs exactly its depth in evaluations, each at the noise level of its step."""
    calls: list[tuple[list[int], list[float]]] = []

    def counting(rows: Tensor) -> Denoiser:
        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            assert len(x_t) == len(rows)
            calls.append((rows.tolist(), sigma.tolist()))
            return x_t

        return denoise

    rollout(counting, torch.zeros(4, 2), torch.tensor([1, 3, 2, 2]), RENOISE)
    assert calls == [([0, 1, 2, 3], [1.0] * 4), ([1, 2, 3], [0.75] * 3), ([1], [0.5])]


@by_policy
def test_sample_is_the_rollout_to_the_end(policy: FewStepPolicy) -> None:
    """Sampling and simulating all steps draw the same noise and end at the same place."""
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    endpoints = sample(halving, noise, policy)
    torch.manual_seed(2)
    got = rollout(lambda rows: halving, noise, torch.full((4,), 4), policy)
    assert torch.equal(got.x_0[-1], endpoints)
    torch.manual_seed(3)
    assert torch.equal(sample(halving, noise, policy), endpoints) == (policy.kind == "ode")


def test_deterministic_sampling_draws_nothing() -> None:
    """The ode sampler leaves the random state alone: it is a function of its noise."""
    before = torch.get_rng_state()
    sample(halving, torch.ones(2, 3), POLICIES["ode"])
    assert torch.equal(torch.get_rng_state(), before)


def test_one_step_is_one_prediction() -> None:
    """A grid of one level needs no transition."""
    noise, one = torch.randn(4, 3), FewStepPolicy(FLOW, (1.0,))
    assert torch.equal(sample(halving, noise, one), halving(noise, torch.ones(4)))
    got = rollout(lambda rows: halving, noise, torch.ones(4).long(), one)
    assert torch.equal(got.x_0, halving(noise, torch.ones(4))[None])
    assert torch.equal(got.states, noise[None])
    assert one.num_random_steps == 0


def test_rollout_carries_no_gradient_and_keeps_its_input() -> None:
    """A rollout is data: no graph, and the noise given is not written to."""
    weight = torch.ones((), requires_grad=True)
    noise = torch.ones(2, 3)
    got = rollout(lambda rows: lambda x_t, sigma: weight * x_t, noise, torch.tensor([1, 3]), RENOISE)
    assert not got.x_0.requires_grad
    assert not got.states.requires_grad
    got.states[0] = 7.0
    assert torch.equal(noise, torch.ones(2, 3))


def test_transitions_lead_to_the_next_level() -> None:
    """Each step leads to the next noise level of the grid, the last to 0, where the transition has no spread."""
    steps = torch.arange(4)
    assert RENOISE.levels(steps).tolist() == list(SIGMAS)
    assert RENOISE.levels(steps + 1).tolist() == [*SIGMAS[1:], 0.0]
    transition = RENOISE.transition(torch.zeros(4, 1), torch.ones(4, 1), steps)
    assert transition.std.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert transition.mean[:, 0].tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("kind", "num_random", "inference"),
    [("renoise", 3, "renoise"), ("cps", 3, "ode"), ("sde", 3, "ode"), ("ode", 0, "ode")],
)
def test_what_a_policy_says_of_itself(kind: TransitionKind, num_random: int, inference: TransitionKind) -> None:
    """All steps but the last are random, none of an ode; noise that only explores is left out of inference."""
    policy = FewStepPolicy(FLOW, SIGMAS, kind, 0.5)
    assert (policy.num_steps, policy.num_random_steps) == (4, num_random)
    assert policy.inference().kind == inference
    assert (policy.inference().schedule, policy.inference().sigmas) == (FLOW, SIGMAS)
    transition = policy.transition(torch.zeros(4, 1), torch.ones(4, 1), torch.arange(4))
    assert int((transition.std > 0).sum()) == num_random


modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@modest
@given(
    num_groups=st.integers(1, 5),
    group_size=st.integers(1, 5),
    num_steps=st.integers(1, 5),
    num_iterations=st.integers(1, 11),
    seed=st.integers(0, 2**31),
)
def test_plans_are_latin(num_groups: int, group_size: int, num_steps: int, num_iterations: int, seed: int) -> None:
    """Any K uses in a row visit every step for every sample; each use is spread over the batch like the first."""
    torch.manual_seed(seed)
    first = draw_steps("stratified", num_groups, group_size, num_steps, torch.device("cpu"))
    plan = plan_steps(first, num_iterations, num_steps)
    assert plan.shape == (num_iterations, len(first))
    assert torch.equal(plan[0], first)
    for start in range(num_iterations - num_steps + 1):
        visited = plan[start : start + num_steps].sort(0).values
        assert torch.equal(visited, torch.arange(num_steps)[:, None].expand_as(visited))
    spread = torch.bincount(first, minlength=num_steps).sort().values
    for steps in plan:
        assert torch.equal(torch.bincount(steps, minlength=num_steps).sort().values, spread)
    for before, after in pairwise(plan):
        assert torch.equal(after, (before + 1) % num_steps)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_no_use_reads_a_state_that_was_never_drawn(first: int) -> None:
    """A rollout goes no further than its first use; what each use redraws is what the next one starts from."""
    policy = FewStepPolicy(FlowSchedule(), (1.0, 0.75, 0.5, 0.25))
    torch.manual_seed(0)
    steps = torch.full((3,), first)
    plan = plan_steps(steps, 9, policy.num_steps)
    done = rollout(lambda rows: lambda x_t, sigma: 0.5 * x_t, torch.randn(3, 2), plan[0] + 1, policy)
    reached = torch.arange(policy.num_steps)[:, None] <= done.depths.clamp_max(policy.num_steps - 1)
    done.states[~reached] = torch.nan
    for use in plan:
        states = select_steps(done.states, use)
        assert states.isfinite().all()
        redraw(done, 0.5 * states, use, policy)


def test_selecting_each_sample_s_own_step() -> None:
    """Entries of a trajectory by step and row, all rows when none are named; conditions by row."""
    trajectory = torch.arange(24).reshape(3, 4, 2)
    expected = [trajectory[k, i].tolist() for i, k in enumerate([2, 0, 1, 2])]
    assert select_steps(trajectory, torch.tensor([2, 0, 1, 2])).tolist() == expected
    assert select_steps(trajectory, torch.tensor([1, 2]), torch.tensor([3, 0])).tolist() == [[14, 15], [16, 17]]
    condition = select({"a": trajectory[0], "b": trajectory[1]}, torch.tensor([3, 3, 0]))
    assert condition["a"].tolist() == [[6, 7], [6, 7], [0, 1]]
    assert condition["b"].tolist() == [[14, 15], [14, 15], [8, 9]]


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
    family = load_family(teacher_path(), torch.float32)
    assert family.student_sigmas(steps, shift) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "eta", "random"), [("renoise", 0.0, 3), ("cps", 0.5, 3), ("cps", 0.0, 0), ("ode", 1.0, 0)]
)
def test_steps_without_noise_have_no_density(kind: TransitionKind, eta: float, random: int) -> None:
    """Of four steps the last never is random; without noise none is, and asking for a ratio says so."""
    policy = FewStepPolicy(FLOW, SIGMAS, kind, eta)
    assert policy.num_random_steps == random
    done = Rollout(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), torch.full((2,), 4))
    with pytest.raises(ValueError, match=f"step {random} of {kind!r} has no density"):
        replay_log_ratio(done, torch.zeros(2, 3), torch.arange(2), torch.full((2,), random), policy, "sum")
