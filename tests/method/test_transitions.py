"""Transition rules: cps keeps the grid's levels, sde is Flow-GRPO's step, and every last step is deterministic."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule, add_noise, to_x_0
from rdm_sdk.method.transitions import (
    TRANSITIONS,
    cps_transition,
    ode_transition,
    renoising_transition,
    sde_transition,
    step,
)

FLOW, VP = FlowSchedule(), VariancePreservingSchedule()
SHAPE = (5, 3, 4, 4)
RULES = [(FLOW, kind) for kind in TRANSITIONS] + [(VP, kind) for kind in TRANSITIONS if kind != "sde"]

modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)
by_schedule = pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow_schedule", "vp_schedule"])
by_rule = pytest.mark.parametrize(
    ("schedule", "kind"), RULES, ids=[f"{'flow' if schedule is FLOW else 'vp'}-{kind}" for schedule, kind in RULES]
)


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def levels(first=0.95, last=0.15):
    """Return a noise level and the next one for each sample."""
    sigma = torch.linspace(first, 0.4, SHAPE[0])
    return sigma, torch.linspace(0.7, last, SHAPE[0])


@by_schedule
def test_cps_between_renoising_and_the_ode(schedule):
    """cps with eta=1 is the re-noising transition, with eta=0 the deterministic one; in between it is neither."""
    x_t, x_0 = draw(2)
    sigma, sigma_next = levels(first=1.0)
    arguments = (schedule, x_t, x_0, sigma, sigma_next)
    renoise, ode = renoising_transition(*arguments), ode_transition(*arguments)
    fresh, kept, half = (cps_transition(*arguments, eta) for eta in (1.0, 0.0, 0.5))
    torch.testing.assert_close(fresh.mean, renoise.mean)
    assert torch.equal(fresh.std, renoise.std)
    assert torch.equal(kept.mean, ode.mean)
    assert ode.std.tolist() == kept.std.tolist() == [0.0] * SHAPE[0]
    assert (half.mean - renoise.mean).abs().amax((1, 2, 3)).min() > 0.1
    assert (half.mean - ode.mean).abs().amax((1, 2, 3)).min() > 0.1


@by_schedule
def test_ode_stays_on_its_line(schedule):
    """With the true x_0, the deterministic step leads to the same data under the same noise, at the next level."""
    x_0, eps = draw(2)
    sigma, sigma_next = levels()
    after = step(ode_transition(schedule, add_noise(schedule, x_0, eps, sigma), x_0, sigma, sigma_next), eps)
    torch.testing.assert_close(after, add_noise(schedule, x_0, eps, sigma_next), rtol=1e-4, atol=1e-5)


@modest
@given(
    vp=st.booleans(), eta=st.floats(0, 1), sigma=st.floats(0.05, 1), fraction=st.floats(0, 1), noise=st.floats(0.5, 2)
)
def test_cps_preserves_the_levels(vp, eta, sigma, fraction, noise):
    """x_{k+1} has signal alpha' and noise variance kept^2 + std^2 = sigma'^2, where x_k had those of its own level."""
    schedule = VP if vp else FLOW
    now, after = torch.tensor([sigma], dtype=torch.float64), torch.tensor([fraction * sigma], dtype=torch.float64)
    x_0, eps = torch.tensor([[0.8]], dtype=torch.float64), torch.tensor([[noise]], dtype=torch.float64)
    transition = cps_transition(schedule, add_noise(schedule, x_0, eps, now), x_0, now, after, eta)
    kept = (transition.mean - schedule.alpha(after) * x_0) / eps
    assert kept.item() >= -1e-12
    assert (kept.square() + transition.std.square()).item() == pytest.approx(after.item() ** 2, abs=1e-12)
    assert transition.std.item() == pytest.approx(after.item() * math.sin(eta * math.pi / 2), abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_cps_equals_a_ddim_step(eta):
    """On a variance-preserving schedule it is DDIM's step (arXiv 2010.02502), once the two etas name one deviation."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(8)
    prediction, x_t, eps = draw(3)
    for timestep in scheduler.timesteps[[0, 3, 6]]:
        before, after = scheduler.alphas_cumprod[timestep], scheduler.alphas_cumprod[timestep - 125]
        sigma, sigma_next = ((1 - cumulative).sqrt() for cumulative in (before, after))
        theirs = scheduler.step(prediction, timestep, x_t, eta=eta, variance_noise=eps).prev_sample
        deviation = eta * sigma_next / sigma * (1 - before / after).sqrt()
        own_eta = 2 / math.pi * math.asin(deviation / sigma_next)
        sigma, sigma_next = sigma.expand(SHAPE[0]), sigma_next.expand(SHAPE[0])
        x_0 = to_x_0(VP, "eps", prediction, x_t, sigma)
        ours = step(cps_transition(VP, x_t, x_0, sigma, sigma_next, own_eta), eps)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def flow_grpo_step(sample, velocity, sigma, sigma_next, largest, noise_level):
    """The step of arXiv 2505.05470 as its code writes it, for one sample; dt is negative."""
    dt = sigma_next - sigma
    std_dev_t = math.sqrt(sigma / (1 - (largest if sigma == 1 else sigma))) * noise_level
    mean = sample * (1 + std_dev_t**2 / (2 * sigma) * dt)
    mean = mean + velocity * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_dev_t * math.sqrt(-dt)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
def test_sde_equals_flow_grpo(eta):
    """Mean and deviation are those of Flow-GRPO's step, written independently, pure noise included."""
    x_t, velocity = draw(2)
    grid = [1.0, 0.9, 0.75, 0.5, 0.25, 0.1]
    sigma, sigma_next = torch.tensor(grid[:-1]), torch.tensor(grid[1:])
    transition = sde_transition(FLOW, x_t, to_x_0(FLOW, "flow", velocity, x_t, sigma), sigma, sigma_next, eta)
    for i in range(SHAPE[0]):
        mean, std = flow_grpo_step(x_t[i], velocity[i], grid[i], grid[i + 1], grid[1], eta)
        torch.testing.assert_close(transition.mean[i], mean, rtol=1e-4, atol=1e-5)
        assert transition.std[i].item() == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize(("kind", "eta"), [("ode", 0.0), ("sde", 0.5), ("sde", 1.0)])
def test_small_steps_lead_from_noise_to_the_data(kind, eta):
    """With the exact denoiser of a Gaussian and many steps, ode and sde transport N(0, 1) to it: same marginals.

    The denoiser is affine, so mean and variance propagate in closed form: x -> slope x + offset, plus std^2.
    """
    data_mean, data_std, num_steps = 0.8, 0.5, 2000
    mean, variance = 0.0, 1.0
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    for sigma, sigma_next in pairwise(grid):
        x_t, now = torch.tensor([[0.0], [1.0]], dtype=torch.float64), sigma.expand(2)
        alpha = 1 - sigma
        gain = alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2)
        x_0 = data_mean + gain * (x_t - alpha * data_mean)
        transition = TRANSITIONS[kind](FLOW, x_t, x_0, now, sigma_next.expand(2), eta)
        offset = transition.mean[0].item()
        slope = transition.mean[1].item() - offset
        mean, variance = slope * mean + offset, slope**2 * variance + transition.std[0].item() ** 2
    assert mean == pytest.approx(data_mean, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(data_std, rel=0.02)


def test_sde_needs_a_rectified_flow():
    """The step is derived for rectified flows only, and says so on any other schedule."""
    x_t, x_0 = draw(2)
    with pytest.raises(ValueError, match="rectified flows"):
        sde_transition(VP, x_t, x_0, *levels(), 0.7)


@by_rule
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_last_step_is_deterministic(schedule, kind, eta):
    """Every rule ends exactly at the prediction, without noise, also where one sample of a batch does."""
    x_t, x_0 = draw(2)
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.1])
    transition = TRANSITIONS[kind](schedule, x_t, x_0, sigma, torch.zeros(SHAPE[0]), eta)
    assert transition.std.tolist() == [0.0] * SHAPE[0]
    torch.testing.assert_close(transition.mean, x_0, rtol=1e-5, atol=1e-5)
    one = TRANSITIONS[kind](schedule, x_t, x_0, sigma, torch.tensor([0.9, 0.6, 0.4, 0.0, 0.05]), eta)
    assert (one.std[[0, 1, 2, 4]] > 0).all() == (kind != "ode")
    assert one.std[3] == 0


def test_the_ode_has_no_noise_anywhere():
    """A deterministic sampler has none at any step."""
    x_t, x_0 = draw(2)
    assert not ode_transition(FLOW, x_t, x_0, *levels()).std.any()


@by_rule
def test_samples_do_not_meet(schedule, kind):
    """Each sample has its own levels: alone or in a batch, its transition is the same."""
    x_t, x_0 = draw(2)
    sigma, sigma_next = levels()
    together = TRANSITIONS[kind](schedule, x_t, x_0, sigma, sigma_next, 0.6)
    for i in range(SHAPE[0]):
        own = slice(i, i + 1)
        alone = TRANSITIONS[kind](schedule, x_t[own], x_0[own], sigma[own], sigma_next[own], 0.6)
        assert torch.equal(alone.mean, together.mean[own])
        assert torch.equal(alone.std, together.std[own])
