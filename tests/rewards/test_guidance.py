"""Guidance as a reward: beside `dm` it is DMD's guided gradient, from the same draws and the same forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdm_sdk import RDMTrainer, RewardBatch, RewardError
from rdm_sdk.method.groups import Normalization, group_scale
from rdm_sdk.method.noise import FlowSchedule, per_sample
from rdm_sdk.method.objective import normalize
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.rewards.evaluate import Evaluation, evaluate_rewards
from rdm_sdk.rewards.guidance import Guidance

Make = Callable[..., RDMTrainer]
MEANS = {"with": 1.0, "without": 0.4, "fake": -1.0}
G = 4


def gaussian(mean: float, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact x_0 of data with this mean and unit variance."""
    sigma = sigma.reshape(-1, 1, 1)
    return mean + (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * (x_t - (1 - sigma) * mean)


class Networks:
    """Gaussian networks that take down at which x_t they were asked."""

    def __init__(self) -> None:
        self.asked: dict[str, list[Tensor]] = {"teacher": [], "pair": [], "fake": []}

    def denoiser(self, role: str) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            self.asked[role].append(x_t)
            return gaussian(MEANS["with" if role == "teacher" else role], x_t, sigma)

        return denoise

    def pair(self, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        self.asked["pair"].append(x_t)
        return gaussian(MEANS["with"], x_t, sigma), self.unprompted(x_t, sigma)

    def unprompted(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(MEANS["without"], x_t, sigma)


def judged(
    rewards: dict[str, object], scale: float, networks: Networks, correct: str = "others", apart: bool = False
) -> Evaluation:
    """Evaluate rewards on fixed samples with fixed noise, the teacher guided by `scale`.

    `apart` lets the teacher be asked without the prompt by itself.
    """
    latents = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0))

    def guide(x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor) -> Tensor:
        return without + scale * (with_prompt - without)

    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=networks.denoiser,
        min_time=0.02,
        max_time=0.98,
        critic_correction=correct,
        guide=None if scale == 1.0 else guide,
        denoiser_pair=networks.pair,
        unprompted=networks.unprompted if apart else None,
    )
    torch.manual_seed(7)
    batch = RewardBatch(
        latents=latents, prompts=["a"] * 4 + ["b"] * 4, group_size=G, decode=lambda x: x, context=context
    )
    return evaluate_rewards(rewards, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.7, 4.5])
@pytest.mark.parametrize("correct", ["none", "others"])
def test_dm_and_guidance_make_the_guided_gradient(scale: float, correct: str) -> None:
    """D_cfg - D_fake = (D_real - D_fake) + (s - 1) (D_real - D_uncond), gradient for gradient."""
    dm, guidance = DistributionMatching(), Guidance()
    guided = judged({"dm": dm}, scale, Networks(), correct=correct).outputs["dm"]
    apart = judged({"dm": dm, "guidance": guidance}, 1.0, Networks(), correct=correct).outputs
    total = apart["dm"].gradient + (scale - 1) * apart["guidance"].gradient
    torch.testing.assert_close(total, guided.gradient, rtol=1e-5, atol=1e-5)
    assert apart["guidance"].gradient.abs().min() > 1e-3
    assert torch.equal(apart["guidance"].magnitude, apart["dm"].magnitude)  # so the split outlives normalization


@pytest.mark.parametrize("normalization", ["sample", "group"])
def test_after_normalization_the_sum_is_longer_by_the_ratio_of_the_residuals(normalization: Normalization) -> None:
    """Same direction as the guided gradient, and another divisor: |x_0 - D_real| in the place of |x_0 - D_cfg|."""
    scale = 4.5
    dm, guidance = DistributionMatching(), Guidance()
    guided = judged({"dm": dm}, scale, Networks()).outputs
    apart = judged({"dm": dm, "guidance": guidance}, 1.0, Networks()).outputs
    parts = normalize(apart, G, normalization)
    total = parts["dm"] + (scale - 1) * parts["guidance"]
    wanted = normalize(guided, G, normalization)["dm"]
    longer, shorter = (group_scale(o["dm"].magnitude, G, normalization) for o in (guided, apart))
    torch.testing.assert_close(total, wanted * per_sample(longer / shorter, wanted), rtol=1e-4, atol=1e-5)
    assert (longer / shorter).mean() > 1.2


def test_the_critics_lag_is_taken_out_of_dm() -> None:
    """With samples of another mean than the critic's, the corrected gradient is nearer to the exact critic's."""
    torch.manual_seed(0)
    latents = -0.4 + torch.randn(64, 2, 3)
    errors = {}
    for correct in ("none", "others"):
        networks = Networks()
        context = DiffusionContext(
            schedule=FlowSchedule(),
            denoiser=networks.denoiser,
            min_time=0.02,
            max_time=0.98,
            critic_correction=correct,
        )
        batch = RewardBatch(latents=latents, prompts=["a"] * 64, group_size=64, decode=lambda x: x, context=context)
        gradient = evaluate_rewards({"dm": DistributionMatching()}, batch).outputs["dm"].gradient
        seen = context.renoise(batch.latents, 64)
        exact = gaussian(MEANS["with"], seen.x_t, seen.sigma) - gaussian(-0.4, seen.x_t, seen.sigma)
        errors[correct] = (gradient - exact).abs().mean().item()
    assert errors["others"] < 0.6 * errors["none"]


def test_guidance_is_the_difference_of_the_teachers_two_predictions() -> None:
    """Gradient D_real - D_uncond; the score is higher where the prompt explains the sample better."""
    networks = Networks()
    output = judged({"guidance": Guidance()}, 1.0, networks).outputs["guidance"]
    (x_t,) = networks.asked["pair"]
    assert not networks.asked["fake"]
    assert (output.gradient > 0).all()  # toward the prompt's mean, which is the higher one
    up, down = (
        evaluate_rewards(
            {"guidance": Guidance()},
            RewardBatch(
                latents=torch.full((400, 2, 3), value),
                prompts=["a"] * 400,
                group_size=400,
                decode=lambda x: x,
                context=DiffusionContext(
                    schedule=FlowSchedule(),
                    denoiser=networks.denoiser,
                    min_time=0.02,
                    max_time=0.98,
                    denoiser_pair=networks.pair,
                ),
            ),
        ).outputs["guidance"]
        for value in (1.0, 0.4)
    )
    assert up.scores.mean() > 0 > down.scores.mean()
    assert x_t.shape == (8, 2, 3)


@pytest.mark.parametrize("order", [("dm", "guidance"), ("guidance", "dm")])
def test_noise_is_shared(order: tuple[str, str]) -> None:
    """Both rewards of one evaluation see the very same x_t, and no network is asked twice about one."""
    networks = Networks()
    made = {"dm": DistributionMatching(), "guidance": Guidance()}
    judged({name: made[name] for name in order}, 1.0, networks)
    assert len(networks.asked["fake"]) == 1
    seen = networks.asked["pair"]
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in networks.asked["fake"]]
    again = Networks()
    judged({"dm": made["dm"]}, 3.0, again)
    assert all(torch.equal(a, b) for a, b in zip(again.asked["fake"], networks.asked["fake"], strict=True))


def test_the_other_half_of_a_pair_is_of_the_same_noise() -> None:
    """After `dm` has asked the teacher, guidance asks it without the prompt alone, and is what it is by the pair."""
    made = {"dm": DistributionMatching(), "guidance": Guidance()}
    networks = Networks()
    apart = judged(made, 1.0, networks, apart=True).outputs["guidance"]
    assert not networks.asked["pair"]
    assert torch.equal(apart.gradient, judged(made, 1.0, Networks()).outputs["guidance"].gradient)


def test_a_second_batch_gets_noise_of_its_own() -> None:
    """Noise belongs to a batch: a context that meets other samples must not answer with the first ones' noise."""
    networks = Networks()
    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=networks.denoiser,
        min_time=0.02,
        max_time=0.98,
        denoiser_pair=networks.pair,
    )
    for latents in (torch.zeros(4, 2, 3), torch.full((4, 2, 3), 50.0)):
        batch = RewardBatch(latents=latents, prompts=["a"] * 4, group_size=4, decode=lambda x: x, context=context)
        evaluate_rewards({"guidance": Guidance()}, batch)
    assert len(networks.asked["pair"]) == 2
    first, second = networks.asked["pair"]
    assert first.abs().max() < 10
    assert second.abs().max() > 0.5
    assert not torch.equal(first, second)


def test_without_a_teacher_pair_it_says_so() -> None:
    """A batch whose context cannot leave the prompt out, or none at all, gives a clear error."""
    context = DiffusionContext(schedule=FlowSchedule(), denoiser=Networks().denoiser, min_time=0.02, max_time=0.98)
    batch = RewardBatch(
        latents=torch.zeros(4, 2, 3), prompts=["a"] * 4, group_size=4, decode=lambda x: x, context=context
    )
    with pytest.raises(RewardError, match="no teacher without the prompt"):
        evaluate_rewards({"guidance": Guidance()}, batch)
    with pytest.raises(RewardError, match="'guidance' needs the models of a training run; in one, declare"):
        evaluate_rewards(
            {"guidance": Guidance()},
            RewardBatch(latents=torch.zeros(4, 2, 3), prompts=["a"] * 4, group_size=4, decode=lambda x: x),
        )


def test_the_split_costs_no_more_than_guidance(make_trainer: Make, tmp_path: Path) -> None:
    """Decoupled or guided, a run makes the same number of teacher evaluations, and of all others."""
    guided = make_trainer(tmp_path, "dm", guidance_scale=3.0)
    apart = make_trainer(tmp_path, "dm + 2*guidance", guidance_scale=1.0)
    for trainer in (guided, apart):
        trainer.train()
    calls = {"cost/reward_calls": 2 * guided.costs()["cost/reward_calls"]}
    assert apart.costs() == guided.costs() | calls
    assert guided.costs()["cost/teacher_forwards"] == 2 * 2 * 8


def test_guidance_alone_trains_without_a_critic(make_trainer: Make, tmp_path: Path) -> None:
    """It trains no role of its own."""
    trainer = make_trainer(tmp_path, "guidance", critic_steps=0)
    trainer.train()
    assert trainer.roles.trainable_roles == ("student",)
    assert trainer.state.log_history[0]["grad_norm"] > 0
    assert trainer.state.log_history[0]["rewards/guidance/mean"] != 0


def test_the_noise_is_standard_and_the_same_for_every_dtype() -> None:
    """Samples in bfloat16 are re-noised like the same values in float32, and x_t keeps its bits."""
    context = DiffusionContext(schedule=FlowSchedule(), denoiser=Networks().denoiser, min_time=0.02, max_time=0.98)
    x_0, sigma = torch.ones(64, 4, 8, 8, dtype=torch.bfloat16), torch.full((64,), 0.5)
    noised = []
    for own in (x_0, x_0.float()):
        torch.manual_seed(3)
        noised.append(context.add_noise(own, sigma))
        assert noised[-1].dtype == torch.float32
        noise = (noised[-1] - 0.5 * own) / 0.5
        assert abs(float(noise.mean())) < 0.05
        assert abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(*noised)


def test_the_teacher_without_the_prompt_is_told_none(make_trainer: Make, tmp_path: Path) -> None:
    """Asked by itself, it says what it says beside its prediction with the prompt, and that is another."""
    models = (trainer := make_trainer(tmp_path)).models
    context = trainer.judge.context(models.encode(["a handwritten seven", "a handwritten one"]))
    x_t, sigma = torch.randn(2, *models.latent_shapes[0]), torch.tensor([0.4, 0.8])
    assert context.denoiser_pair is not None
    assert context.unprompted is not None
    with_prompt, without = context.denoiser_pair(x_t, sigma)
    torch.testing.assert_close(context.unprompted(x_t, sigma), without, rtol=1e-4, atol=1e-4)
    assert (with_prompt - without).abs().max() > 1e-2
