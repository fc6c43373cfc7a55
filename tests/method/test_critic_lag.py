"""critic_lag finds how far the critic is behind the student, and corrects nothing that chance explains."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.method.matching import critic_lag, lag_profile, shared_square
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule, add_noise

FLOW, VP = FlowSchedule(), VariancePreservingSchedule()

modest = settings(max_examples=50, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def residuals(num_groups, group_size, shape, lag, seed=0, schedule=FLOW, one_level=False):
    """Return x_0, residuals and profile for students N(0, I) whose critic still believes in N(-lag, I)."""
    generator = torch.Generator().manual_seed(seed)
    num = num_groups * group_size
    x_0, eps = (torch.randn(num, *shape, generator=generator) for _ in range(2))
    sigma = 0.2 + 0.7 * torch.rand(num, generator=generator)
    if one_level:
        sigma = sigma[::group_size].repeat_interleave(group_size)
    x_t, column = add_noise(schedule, x_0, eps, sigma), sigma.reshape(-1, *([1] * len(shape)))
    a = schedule.alpha(column)
    believed = -lag
    denoised = believed + a / (a**2 + column**2) * (x_t - a * believed)
    return x_0, x_0 - denoised, lag_profile(schedule, sigma)


def by_loops(residual, profile, group_size):
    """Generalized least squares and James-Stein shrinkage, one group, one sample and one number at a time."""
    rows, profile, result = residual.double().flatten(1).tolist(), profile.double().tolist(), []
    dims = range(len(rows[0]))
    for i in range(len(rows)):
        start = i - i % group_size
        used = [j for j in range(start, start + group_size) if j != i]
        weight = sum(profile[j] for j in used)
        lag = [sum(rows[j][d] for j in used) / weight for d in dims]
        misfit = sum((rows[j][d] - profile[j] * lag[d]) ** 2 for j in used for d in dims)
        variance = misfit / weight**2 * len(used) / (len(used) - 1)
        kept = max(0.0, 1 - variance / sum(slope**2 for slope in lag))
        result.append([kept * profile[i] * slope for slope in lag])
    return torch.tensor(result).reshape(residual.shape)


@modest
@given(num_groups=st.integers(1, 3), group_size=st.integers(3, 6), lag=st.sampled_from([0.0, 0.5, 3.0]), seed=seeds)
def test_equals_the_loop(num_groups, group_size, lag, seed):
    """All groups at once equal a slow loop, whether much, little or nothing is kept."""
    _, residual, profile = residuals(num_groups, group_size, (2, 3), lag, seed)
    fast = critic_lag(residual, profile, group_size)
    torch.testing.assert_close(fast, by_loops(residual, profile, group_size), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group_size", [1, 2])
def test_groups_without_scatter_get_no_correction(group_size):
    """One other residual has no scatter to tell lag from chance by: exactly zero, so groups of one stay DMD2."""
    _, residual, profile = residuals(6, group_size, (4,), lag=3.0)
    correction = critic_lag(residual, profile, group_size)
    assert torch.equal(correction, torch.zeros(6 * group_size, 4))


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=lambda s: type(s).__name__)
def test_recovers_a_known_lag(schedule):
    """A critic behind by a known shift is corrected by profile times that shift, closely so in large groups."""
    lag = torch.linspace(-0.6, 0.6, 16)
    for group_size, tolerance in ((256, 0.5), (16_384, 0.06)):
        _, residual, profile = residuals(3, group_size, (16,), lag, schedule=schedule)
        exact = profile[:, None] * lag
        error = critic_lag(residual, profile, group_size) - exact
        for own, truth in zip(error.split(group_size), exact.split(group_size), strict=True):
            assert own.norm() < tolerance * truth.norm()


def test_an_exact_critic_is_left_alone_at_one_level():
    """With the exact posterior mean and one noise level per group, nearly all of the mean is taken for chance."""
    for group_size in (4, 8, 16):
        _, residual, profile = residuals(512, group_size, (64,), lag=0.0, one_level=True)
        correction = critic_lag(residual, profile, group_size)
        whole = residual.reshape(512, group_size, 64).mean(1, keepdim=True).expand(-1, group_size, -1)
        assert 0 < correction.square().sum() < 0.1 * whole.square().sum()


def test_the_correction_of_an_exact_critic_vanishes():
    """What is left of it falls with the size of the group, whatever the noise levels."""
    sizes = []
    for group_size in (4, 16, 64, 256):
        _, residual, profile = residuals(128, group_size, (64,), lag=0.0)
        sizes.append(critic_lag(residual, profile, group_size).square().mean().sqrt().item())
    assert all(after < 0.7 * before for before, after in pairwise(sizes))
    assert sizes[-1] < 0.05


def test_some_groups_of_an_exact_critic_get_exactly_nothing():
    """The shrinkage is the positive part: where the mean stands out less than chance would have it, it is zero."""
    _, residual, profile = residuals(400, 4, (64,), lag=0.0, one_level=True)
    zero = (critic_lag(residual, profile, 4).flatten(1) == 0).all(1)
    assert 0.35 < zero.float().mean() < 0.65


def test_without_the_sample_itself_the_correction_is_unbiased():
    """By the others alone it pulls neither at a Gaussian student's mean nor at its log-std, at small groups too."""
    for lag in (0.0, 0.5):
        x_0, residual, profile = residuals(8192, 4, (64,), lag=lag, one_level=True)
        correction = critic_lag(residual, profile, 4)
        # d x_0 / d mean = 1 and d x_0 / d log-std = x_0 for the student N(0, I).
        assert abs((correction * x_0).mean().item()) < 0.01
        assert (correction.mean() > 0.05) == (lag > 0)


@modest
@given(order=st.permutations(range(6)), lag=st.sampled_from([0.0, 1.0]), seed=seeds)
def test_permuting_a_group_permutes_its_correction(order, lag, seed):
    """Law 5: the result for a sample does not depend on its place in the group."""
    _, residual, profile = residuals(1, 6, (5,), lag, seed)
    permuted = critic_lag(residual[list(order)], profile[list(order)], 6)
    torch.testing.assert_close(permuted, critic_lag(residual, profile, 6)[list(order)], rtol=1e-3, atol=1e-5)


def test_groups_do_not_meet():
    """Law 5: a group's correction is its own, bit for bit, whatever the other groups hold."""
    _, residual, profile = residuals(4, 3, (2, 5), lag=1.0)
    together = critic_lag(residual, profile, 3)
    for own in (slice(0, 6), slice(6, 9), slice(9, 12)):
        assert torch.equal(critic_lag(residual[own], profile[own], 3), together[own])
    changed = residual.clone()
    changed[3:6] = 100.0
    assert torch.equal(critic_lag(changed, profile, 3)[6:], together[6:])


def test_equal_residuals_are_corrected_in_full():
    """Without scatter nothing is chance: residuals that follow the profile are returned whole; zeros stay zeros."""
    profile = torch.tensor([0.2, 0.5, 0.9])
    residual = profile[:, None] * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(critic_lag(residual, profile, 3), residual)
    assert torch.equal(critic_lag(torch.zeros(3, 2), profile, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("group_size", [0, -2, 4, 5])
def test_groups_must_be_whole(group_size):
    """Samples that do not divide into groups are an error, not a smaller group."""
    with pytest.raises(ValueError, match="do not divide"):
        critic_lag(torch.zeros(6, 2), torch.ones(6), group_size)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=lambda s: type(s).__name__)
def test_profile_is_the_denoiser_s_slope_in_the_mean(schedule):
    """lag_profile is d D(x_t) / d mean of the exact denoiser of N(mean, 1), by autograd."""
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    mean = torch.full_like(sigma, 0.3, requires_grad=True)
    x_t = torch.linspace(-2, 2, 19, dtype=torch.float64)
    alpha = 1 - sigma if schedule is FLOW else (1 - sigma**2) ** 0.5
    # Posterior of x_0 by precision weighting: prior N(mean, 1), likelihood N(x_t; alpha x_0, sigma^2).
    denoised = (mean + alpha * x_t / sigma**2) / (1 + alpha**2 / sigma**2)
    (slope,) = torch.autograd.grad(denoised.sum(), mean)
    torch.testing.assert_close(lag_profile(schedule, sigma), slope)


def test_what_a_group_has_in_common():
    """The mean product with the group's other samples, pair by pair; alike samples have their square in common."""
    values = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(2))
    rows = values.flatten(1).double().tolist()
    expected = []
    for i in range(6):
        others = [j for j in range(i - i % 3, i - i % 3 + 3) if j != i]
        expected.append(sum(a * b for j in others for a, b in zip(rows[i], rows[j], strict=True)) / (4 * len(others)))
    torch.testing.assert_close(shared_square(values, 3), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    alike = values[:1].expand(4, 2, 2)
    torch.testing.assert_close(shared_square(alike, 4), alike.square().flatten(1).mean(1))


def test_independent_samples_have_nothing_in_common():
    """Whatever their scatter, the average over many groups is the square of their mean: an unbiased estimate."""
    values = 0.5 + torch.randn(40_000, 2, generator=torch.Generator().manual_seed(3))
    assert shared_square(values, 2).mean().item() == pytest.approx(0.25, abs=0.02)
