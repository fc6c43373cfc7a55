"""Law 2: v / eps / x_0 / flow conversions round-trip; noise schedules and steps equal diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from rdm_sdk.families.ddpm import SteppedSchedule
from rdm_sdk.method.matching import denoising_loss
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule, add_noise, from_x_0, to_x_0
from rdm_sdk.method.transitions import ode_transition, renoising_transition, step

FLOW, VP = FlowSchedule(), VariancePreservingSchedule()
KINDS = ["x_0", "eps", "v", "flow"]
SHAPE = (6, 3, 4, 4)

by_schedule = pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow_schedule", "vp_schedule"])
by_kind = pytest.mark.parametrize("kind", KINDS)


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def column(sigma):
    return sigma[:, None, None, None]


def ddpm_sigma(scheduler, timesteps):
    return (1 - scheduler.alphas_cumprod[timesteps]).sqrt()


@by_kind
@by_schedule
def test_prediction_to_x_0_and_back(schedule, kind):
    """Law 2: from_x_0 inverts to_x_0 for any prediction, whether or not it is the true one."""
    prediction, x_t = draw(2)
    sigma = torch.linspace(0.1, 0.9, SHAPE[0])
    x_0 = to_x_0(schedule, kind, prediction, x_t, sigma)
    torch.testing.assert_close(from_x_0(schedule, kind, x_0, x_t, sigma), prediction, rtol=1e-4, atol=1e-4)


@by_kind
@by_schedule
def test_true_predictions_name_the_same_data(schedule, kind):
    """Law 2: the true eps, v and flow, written out here, convert to the true x_0 and come from it."""
    x_0, eps = draw(2)
    sigma = torch.linspace(0.1, 0.9, SHAPE[0])
    alpha = 1 - column(sigma) if schedule is FLOW else (1 - column(sigma) ** 2) ** 0.5
    x_t = alpha * x_0 + column(sigma) * eps
    truth = {"x_0": x_0, "eps": eps, "v": alpha * eps - column(sigma) * x_0, "flow": eps - x_0}[kind]
    torch.testing.assert_close(add_noise(schedule, x_0, eps, sigma), x_t)
    torch.testing.assert_close(to_x_0(schedule, kind, truth, x_t, sigma), x_0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(from_x_0(schedule, kind, x_0, x_t, sigma), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["x_0", "v", "flow"])
@by_schedule
def test_pure_noise_converts(schedule, kind):
    """Law 2 at sigma = 1, where every student starts: all kinds but eps still have an x_0."""
    x_0, eps = draw(2)
    sigma = torch.ones(SHAPE[0])
    prediction = from_x_0(schedule, kind, x_0, eps, sigma)
    torch.testing.assert_close(to_x_0(schedule, kind, prediction, eps, sigma), x_0, rtol=1e-5, atol=1e-5)


@by_schedule
def test_log_snr_rate_is_the_derivative(schedule):
    """Law 2: log_snr_rate equals |d/d sigma log(alpha^2 / sigma^2)| by autograd."""
    sigma = torch.linspace(0.02, 0.98, 50, dtype=torch.float64, requires_grad=True)
    log_snr = (schedule.alpha(sigma).square() / sigma.square()).log()
    (derivative,) = torch.autograd.grad(log_snr.sum(), sigma)
    torch.testing.assert_close(schedule.log_snr_rate(sigma.detach()), derivative.abs())


@pytest.mark.parametrize(("schedule", "native"), [(FLOW, "flow"), (VP, "eps")], ids=["flow_schedule", "vp_schedule"])
def test_critic_loss_is_the_native_loss(schedule, native):
    """Law 2: denoising_loss of an x_0 equals the per-sample mean squared error of the native prediction."""
    x_0, eps, error = draw(3)
    sigma = torch.linspace(0.1, 0.9, SHAPE[0])
    x_t = add_noise(schedule, x_0, eps, sigma)
    target = from_x_0(schedule, native, x_0, x_t, sigma)
    prediction = target + 0.3 * error
    loss = denoising_loss(schedule, x_0, to_x_0(schedule, native, prediction, x_t, sigma), sigma)
    expected = (prediction - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def stepped(prediction="eps"):
    """Return the schedule of Stable Diffusion's thousand timesteps."""
    kept = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    return SteppedSchedule((1 - kept).sqrt().float(), kept.sqrt().float(), prediction)


@pytest.mark.parametrize("native", ["eps", "v", "x_0"])
def test_critic_loss_follows_what_a_base_predicts(native):
    """Law 2: on a base's own timesteps, the critic's loss is that of the noise, of v or of x_0, as the base has it."""
    schedule = stepped(native)
    x_0, eps, error = draw(3)
    sigma = schedule.sigmas[[1, 100, 400, 600, 800, 999]]
    x_t = add_noise(schedule, x_0, eps, sigma)
    target = from_x_0(schedule, native, x_0, x_t, sigma)
    prediction = target + 0.3 * error
    loss = denoising_loss(schedule, x_0, to_x_0(schedule, native, prediction, x_t, sigma), sigma)
    torch.testing.assert_close(loss, (0.3 * error).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_stepped_time_is_the_share_of_timesteps():
    """Law 2: a level's time is its timestep's share; levels from one time to another are those of the timesteps."""
    schedule = stepped()
    assert torch.equal(schedule.time(schedule.sigmas), torch.arange(1000) / 1000)
    assert schedule.time(torch.zeros(1)).item() == 0
    uniform = torch.arange(6) / 6 + 0.01
    levels = schedule.levels(uniform, torch.full((6,), 0.5), torch.full((6,), 0.505))
    assert torch.equal(levels, schedule.sigmas[500:506])
    shares = torch.arange(1000) / 1000
    assert torch.equal(schedule.levels(torch.zeros(1000), shares, shares), schedule.sigmas)
    ends = torch.tensor([0.0, 1 - 1e-6])
    for (low, high), timesteps in (((0.02, 0.98), [20, 980]), ((0.0, 1.0), [0, 999])):
        drawn = schedule.levels(ends, torch.full((2,), low), torch.full((2,), high))
        assert torch.equal(drawn, schedule.sigmas[timesteps])


def test_stepped_log_snr_rate_is_the_derivative_in_time():
    """Law 2: log_snr_rate on timesteps is the slope of log-SNR over a thousandth of time."""
    schedule = stepped()
    log_snr = 2 * (schedule.alphas.double() / schedule.sigmas.double()).log()
    slope = (log_snr[:-2] - log_snr[2:]) * 1000 / 2
    torch.testing.assert_close(schedule.log_snr_rate(schedule.sigmas[1:-1]).double(), slope, rtol=1e-3, atol=1e-3)


def test_flow_noise_equals_diffusers():
    """Law 2: add_noise equals FlowMatchEulerDiscreteScheduler.scale_noise on a shifted grid."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(SHAPE[0])
    x_0, eps = draw(2)
    ours = add_noise(FLOW, x_0, eps, scheduler.sigmas[: SHAPE[0]])
    torch.testing.assert_close(ours, scheduler.scale_noise(x_0, scheduler.timesteps, eps))


def test_ddpm_noise_and_velocity_equal_diffusers():
    """Law 2: add_noise and the v prediction equal DDPMScheduler's at sigma = sqrt(1 - alphas_cumprod)."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    timesteps = torch.tensor([5, 120, 400, 600, 800, 999])
    sigma = ddpm_sigma(scheduler, timesteps)
    x_0, eps = draw(2)
    x_t = add_noise(VP, x_0, eps, sigma)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, timesteps), rtol=1e-5, atol=1e-5)
    velocity = scheduler.get_velocity(x_0, eps, timesteps)
    torch.testing.assert_close(from_x_0(VP, "v", x_0, x_t, sigma), velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_x_0(VP, "v", velocity, x_t, sigma), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "diffusers_kind"), [("eps", "epsilon"), ("v", "v_prediction"), ("x_0", "sample")])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_predicted_data_equals_diffusers(scheduler_class, kind, diffusers_kind):
    """Law 2: to_x_0 equals the pred_original_sample of a DDPM and of a DDIM step."""
    scheduler = scheduler_class(beta_schedule="scaled_linear", prediction_type=diffusers_kind, clip_sample=False)
    scheduler.set_timesteps(10)
    prediction, x_t = draw(2)
    for timestep in scheduler.timesteps[[1, 5, 8]]:
        theirs = scheduler.step(prediction, timestep, x_t).pred_original_sample
        ours = to_x_0(VP, kind, prediction, x_t, ddpm_sigma(scheduler, timestep).expand(SHAPE[0]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_flow_sampling_equals_diffusers():
    """Law 2: re-noising transitions equal FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), step by step."""
    num_steps = 4
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(num_steps)
    ours = theirs = draw(1)[0]
    their_generator, our_generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for k, timestep in enumerate(scheduler.timesteps):
        flow = theirs.sin()
        sigma, sigma_next = (scheduler.sigmas[i].expand(SHAPE[0]) for i in (k, k + 1))
        transition = renoising_transition(FLOW, ours, to_x_0(FLOW, "flow", flow, ours, sigma), sigma, sigma_next)
        ours = step(transition, torch.randn(SHAPE, generator=our_generator))
        theirs = scheduler.step(flow, timestep, theirs, generator=their_generator).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (transition.std == 0).all()


def test_lcm_sampling_equals_diffusers():
    """Law 2: re-noising transitions equal LCMScheduler's steps, whose boundary scalings vanish at large timesteps."""
    scheduler = LCMScheduler(prediction_type="epsilon", clip_sample=False)
    scheduler.set_timesteps(4)
    ours = theirs = draw(1)[0]
    their_generator, our_generator = torch.Generator().manual_seed(8), torch.Generator().manual_seed(8)
    for timestep, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        eps = theirs.sin()
        sigma, sigma_next = (ddpm_sigma(scheduler, t).expand(SHAPE[0]) for t in (timestep, following))
        transition = renoising_transition(VP, ours, to_x_0(VP, "eps", eps, ours, sigma), sigma, sigma_next)
        ours = step(transition, torch.randn(SHAPE, generator=our_generator))
        theirs = scheduler.step(eps, timestep, theirs, generator=their_generator).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_deterministic_flow_sampling_equals_diffusers(shift):
    """Law 2: ode transitions equal FlowMatchEulerDiscreteScheduler, step by step from pure noise to the data."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    ours = theirs = draw(1)[0]
    for k, timestep in enumerate(scheduler.timesteps):
        flow = theirs.sin()
        sigma, sigma_next = (scheduler.sigmas[i].expand(SHAPE[0]) for i in (k, k + 1))
        transition = ode_transition(FLOW, ours, to_x_0(FLOW, "flow", flow, ours, sigma), sigma, sigma_next)
        assert (transition.std == 0).all()
        ours = transition.mean
        theirs = scheduler.step(flow, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_deterministic_ddim_sampling_equals_diffusers():
    """Law 2: ode transitions equal DDIMScheduler's steps on its grid of timesteps, the last one to the data."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(5)
    ours = theirs = draw(1)[0]
    levels = [*ddpm_sigma(scheduler, scheduler.timesteps), torch.zeros(())]
    for k, timestep in enumerate(scheduler.timesteps):
        eps = theirs.sin()
        sigma, sigma_next = (levels[i].expand(SHAPE[0]) for i in (k, k + 1))
        ours = ode_transition(VP, ours, to_x_0(VP, "eps", eps, ours, sigma), sigma, sigma_next).mean
        theirs = scheduler.step(eps, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
