"""Law 4 over several transitions: stored states, re-weighted by state_log_ratio, are states of the new student."""

from __future__ import annotations

import pytest
import torch

from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule
from rdm_sdk.method.sampling import FewStepPolicy, redraw, replay_log_ratio, rollout, state_log_ratio
from rdm_sdk.types import select_steps

SIGMAS = (1.0, 0.8, 0.55, 0.3)
FLOW, VP = FlowSchedule(), VariancePreservingSchedule()
POLICIES = {
    "renoise": FewStepPolicy(FLOW, SIGMAS),
    "cps": FewStepPolicy(FLOW, SIGMAS, "cps", 0.7),
    "sde": FewStepPolicy(FLOW, SIGMAS, "sde", 0.9),
    "cps-vp": FewStepPolicy(VP, SIGMAS, "cps", 0.7),
}
by_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
by_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


def student(shift=0.0, rows_matter=False):
    """Return a made-up student whose answer depends on state, noise level and, as with prompts, on the row."""

    def student_of(rows):
        own = 0.1 * rows[:, None] if rows_matter else 0.0
        return lambda x_t, sigma: 0.6 * x_t + 0.3 * sigma[:, None] + own + shift

    return student_of


def roll(policy, num, dimensions, student_of, seed=0):
    torch.manual_seed(seed)
    depths = torch.full((num,), policy.num_steps)
    return rollout(student_of, torch.randn(num, dimensions), depths, policy)


@by_reduction
@by_policy
def test_an_unchanged_student_has_log_ratio_zero(policy, reduction):
    """Law 4: exactly 0 at every step before the first update, for each stored transition and for their sum."""
    done = roll(policy, 8, 64, student(rows_matter=True))
    steps = torch.arange(8) % 4
    same = state_log_ratio(student(rows_matter=True), done, steps, policy, reduction)
    assert torch.equal(same, torch.zeros(8))
    rows = torch.tensor([6, 0, 1])
    replayed = replay_log_ratio(done, select_steps(done.x_0, steps[rows], rows), rows, steps[rows], policy, reduction)
    assert torch.equal(replayed, torch.zeros(3))


@by_reduction
@by_policy
def test_log_ratios_of_transitions_add_up(policy, reduction):
    """Law 4: the state's log-ratio is the sum over its transitions, one sample and one normal density at a time."""
    done = roll(policy, 8, 6, student(rows_matter=True))
    steps = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    ours = state_log_ratio(student(0.05, rows_matter=True), done, steps, policy, reduction)
    for i in range(8):
        total, row = 0.0, torch.tensor([i])
        for k in range(int(steps[i])):
            at, state, after = torch.tensor([k]), done.states[k, row], done.states[k + 1, row].double()
            sigma = torch.tensor([SIGMAS[k]])
            for sign, shift in ((1, 0.05), (-1, 0.0)):
                x_0 = student(shift, rows_matter=True)(row)(state, sigma)
                transition = policy.transition(state, x_0, at)
                normal = torch.distributions.Normal(transition.mean.double(), transition.std.double()[:, None])
                total += sign * normal.log_prob(after).sum().item() / (6 if reduction == "mean" else 1)
        assert ours[i].item() == pytest.approx(total, rel=1e-3, abs=1e-5)
        assert (total == 0) == (steps[i] == 0)
    assert ours[[0, 7]].tolist() == [0.0, 0.0]


@by_policy
def test_reweighted_states_are_those_of_the_new_student(policy):
    """Law 4: at every step E_old[ratio] = 1, and re-weighted old states have the mean of the new student's states.

    The student is affine, so the means of its states propagate exactly, one transition of the mean after the other.
    """
    num, shift = 60_000, 0.15
    done = roll(policy, num, 2, student())
    new_mean = old_mean = torch.zeros(1, 2)
    for k in range(1, 4):
        at, sigma = torch.tensor([k - 1]), torch.tensor([SIGMAS[k - 1]])
        row = torch.tensor([0])
        new_mean = policy.transition(new_mean, student(shift)(row)(new_mean, sigma), at).mean
        old_mean = policy.transition(old_mean, student()(row)(old_mean, sigma), at).mean
        ratio = state_log_ratio(student(shift), done, torch.full((num,), k), policy, "sum").exp()
        assert ratio.mean().item() == pytest.approx(1, abs=0.02)
        recovered = (ratio[:, None] * done.states[k]).mean(0)
        torch.testing.assert_close(done.states[k].mean(0), old_mean[0], rtol=0, atol=0.02)
        torch.testing.assert_close(recovered, new_mean[0], rtol=0, atol=0.04)
    assert (new_mean - old_mean).min() > 0.08


@by_policy
def test_redrawn_states_keep_the_ratio_unbiased(policy):
    """Law 4: each transition remembers the student that drew it, so weights fit trajectories of several students."""
    num, middle, newest = 60_000, student(0.15), student(0.3)
    done = roll(policy, num, 2, student())
    for k in (0, 1):  # the student of each use says where the trajectory goes on
        at, levels = torch.full((num,), k), torch.full((num,), SIGMAS[k])
        now = student() if k == 0 else middle
        redraw(done, now(torch.arange(num))(done.states[k], levels), at, policy)
    steps = torch.full((num,), 2)
    ratio = state_log_ratio(newest, done, steps, policy, "sum").exp()
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    mean, row = torch.zeros(1, 2), torch.tensor([0])
    for k in (0, 1):
        mean = policy.transition(mean, newest(row)(mean, torch.tensor([SIGMAS[k]])), torch.tensor([k])).mean
    torch.testing.assert_close((ratio[:, None] * done.states[2]).mean(0), mean[0], rtol=0, atol=0.04)
    assert (done.states[2].mean(0) - mean[0]).abs().max() > 0.06


def test_only_transitions_before_the_step_are_evaluated():
    """Each sample costs as many evaluations as its step, at the levels it came through."""
    asked = []

    def counting(rows):
        def denoise(x_t, sigma):
            asked.append((rows.tolist(), sigma.tolist()))
            return x_t

        return denoise

    policy = POLICIES["renoise"]
    done = roll(policy, 4, 2, student())
    state_log_ratio(counting, done, torch.tensor([2, 0, 3, 1]), policy, "sum")
    expected = [([0, 2, 3], 3 * [1.0]), ([0, 2], 2 * [0.8]), ([2], [0.55])]
    assert [rows for rows, _ in asked] == [rows for rows, _ in expected]
    for (_, got), (_, levels) in zip(asked, expected, strict=True):
        assert got == pytest.approx(levels)
    asked.clear()
    assert torch.equal(state_log_ratio(counting, done, torch.zeros(4).long(), policy, "sum"), torch.zeros(4))
    assert asked == []


def test_the_state_ratio_carries_no_gradient():
    """Weights are constants of the loss: the evaluation builds no graph."""
    weight = torch.ones((), requires_grad=True)
    policy = POLICIES["cps"]
    done = roll(policy, 4, 2, student())
    got = state_log_ratio(lambda rows: lambda x_t, sigma: weight * x_t, done, torch.ones(4).long(), policy, "sum")
    assert not got.requires_grad
    assert (got != 0).all()


@by_reduction
@by_policy
def test_replayed_transitions_have_the_gradient_of_their_density(policy, reduction):
    """Law 4: the log-ratio out of a state is that of normal densities, and so is its gradient in the prediction."""
    done = roll(policy, 6, 5, student(rows_matter=True))
    rows, steps = torch.tensor([5, 0, 3, 3]), torch.tensor([2, 0, 1, 2])
    x_0 = (select_steps(done.x_0, steps, rows) + 0.1).requires_grad_()
    ours = replay_log_ratio(done, x_0, rows, steps, policy, reduction)
    expected = []
    for i, (row, k) in enumerate(zip(rows, steps, strict=True)):
        state, after = done.states[k, row][None], done.states[k + 1, row][None]
        parts = []
        for prediction in (x_0[i : i + 1], done.x_0[k, row][None]):
            transition = policy.transition(state, prediction, k[None])
            parts.append(torch.distributions.Normal(transition.mean, transition.std[:, None]).log_prob(after))
        difference = parts[0] - parts[1]
        expected.append(difference.sum() if reduction == "sum" else difference.mean())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(ours.sum(), x_0)
    (reference,) = torch.autograd.grad(torch.stack(expected).sum(), x_0)
    torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4)
    assert gradient.abs().min() > 0


def test_the_last_step_has_no_ratio():
    """The transition that ends the trajectory is deterministic and has no ratio; neither has any of an ode."""
    policy = POLICIES["renoise"]
    done = roll(policy, 3, 2, student())
    rows = torch.arange(3)
    with pytest.raises((ValueError, IndexError)):
        replay_log_ratio(done, done.x_0[3], rows, torch.full((3,), 3), policy, "sum")
    ode = FewStepPolicy(FLOW, SIGMAS, "ode")
    with pytest.raises(ValueError, match="no density"):
        state_log_ratio(student(), roll(ode, 3, 2, student()), torch.ones(3).long(), ode, "sum")
