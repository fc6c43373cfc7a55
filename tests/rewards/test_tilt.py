"""Rewards that tilt the teacher: the third route, with and without a gradient."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk import (
    Capabilities,
    CheckpointError,
    ConfigError,
    RDMTrainer,
    Reward,
    RewardBatch,
    RewardError,
)
from rdm_sdk.method.groups import group_advantage
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.method.tilting import group_covariance
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.tilt import tilted
from rdm_sdk.types import RewardOutput

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]
G = 4
NAN = float("nan")


def brightness(images: Tensor, prompts: list[str], **columns: object) -> Tensor:
    """Score a picture by its mean; no gradient is declared."""
    return images.mean(dim=(1, 2, 3))


# ---- The field ------------------------------------------------------------------------------------------------------


def teacher(x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return a denoiser whose Jacobian is known: 1 - tanh(x_t)^2 on the diagonal."""
    return x_t.tanh()


def batch_of(latents: Tensor, carries_back: bool = True) -> RewardBatch:
    """Return two groups with the teacher above, and nothing else."""
    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=lambda _role: teacher,
        min_time=0.1,
        max_time=0.9,
        spread="stratified",
        carries_back=carries_back,
    )
    return RewardBatch(
        latents=latents, prompts=["a"] * G + ["b"] * G, group_size=G, decode=lambda x: x, context=context
    )


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2 * G, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_gradient_goes_back_through_the_teacher(latents: Tensor, scale: Any) -> None:
    """Cov grad r over the root of grad r Cov grad r, with dm's magnitude beside it."""
    batch = batch_of(latents)
    gradient = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    found = tilted(RewardOutput(torch.arange(8.0), gradient), batch, scale)
    assert batch.context is not None
    renoised = batch.context.renoise(latents, G)
    sigma = renoised.sigma.reshape(-1, 1, 1)
    field = sigma**2 / (1 - sigma) * (1 - renoised.x_t.tanh() ** 2) * gradient
    variance = (gradient * field).flatten(1).sum(1).reshape(2, G)
    if scale != "none":
        mean = variance.mean(1, keepdim=True) if scale == "group" else variance.mean()
        field = field / mean.expand(2, G).sqrt().reshape(-1, 1, 1)
    assert found.gradient is not None
    assert found.magnitude is not None
    torch.testing.assert_close(found.gradient, field)
    magnitude = (latents - teacher(renoised.x_t, renoised.sigma)).abs().mean(dim=(1, 2))
    torch.testing.assert_close(found.magnitude, magnitude)
    assert not found.gradient.requires_grad
    assert torch.equal(found.scores, torch.arange(8.0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_scores_act_through_their_group(latents: Tensor, scale: Any) -> None:
    """The covariance with the normalized scores; what has no score gets nothing and is in no statistic."""
    batch = batch_of(latents, carries_back=False)
    scores = torch.tensor([1.0, 2.0, NAN, 4.0, 0.5, 0.5, 3.0, 1.0])
    found = tilted(RewardOutput(scores), batch, scale)
    assert batch.context is not None
    renoised = batch.context.renoise(latents, G)
    normalized = group_advantage(scores, G, scale)
    normalized[2] = NAN
    expected = group_covariance(FlowSchedule(), renoised.x_t, renoised.sigma, latents, normalized, G)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient, expected)
    assert not found.gradient[2].any()
    assert found.gradient[1].any()


def test_a_field_does_not_depend_on_the_rewards_units(latents: Tensor) -> None:
    """A reward in hundreds, or with another zero, tilts as far, by either way."""
    gradient, scores = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.arange(8.0) ** 2
    batch = batch_of(latents)
    for one, other in (
        (RewardOutput(scores, gradient), RewardOutput(100 * scores + 7, 100 * gradient)),
        (RewardOutput(scores), RewardOutput(100 * scores + 7)),
    ):
        torch.testing.assert_close(
            tilted(one, batch, "group").gradient, tilted(other, batch, "group").gradient, rtol=1e-4, atol=1e-5
        )


def test_a_satisfied_reward_pushes_nowhere(latents: Tensor) -> None:
    """No gradient, or equal scores: a field of zeros, and no NaN."""
    for output in (RewardOutput(torch.ones(8), torch.zeros_like(latents)), RewardOutput(torch.ones(8))):
        field = tilted(output, batch_of(latents), "group").gradient
        assert field is not None
        assert not field.any()


def test_a_jacobian_that_is_not_positive_explodes_nothing(latents: Tensor) -> None:
    """Networks are no exact denoisers: a negative variance counts by its size, and no group divides by nothing."""
    fields: list[Any] = []
    for sign in (1.0, -1.0):

        def linear(x_t: Tensor, sigma: Tensor, sign: float = sign) -> Tensor:
            return sign * x_t

        context = DiffusionContext(
            schedule=FlowSchedule(),
            denoiser=lambda _role, own=linear: own,
            min_time=0.5,
            max_time=0.500001,
            carries_back=True,
        )
        batch = RewardBatch(latents=latents, prompts=[""] * 8, group_size=G, decode=lambda x: x, context=context)
        fields.append(tilted(RewardOutput(torch.arange(8.0), torch.ones_like(latents)), batch, "group").gradient)
    torch.testing.assert_close(fields[0], -fields[1])
    assert fields[0].abs().max() < 1.0


def test_a_sample_without_score_is_in_no_deviation(latents: Tensor) -> None:
    """What a reward does not apply to changes nothing for the rest of its group."""
    gradient = torch.ones_like(latents)
    gradient[1] = 0.0  # as the host fills it in
    scores = torch.tensor([1.0, NAN, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0])
    batch = batch_of(0.5 * latents)
    missing = tilted(RewardOutput(scores, gradient), batch, "group").gradient
    there = tilted(RewardOutput(torch.arange(8.0), gradient), batch, "group").gradient
    assert missing is not None
    assert there is not None
    assert not missing[1].any()
    assert missing[0].norm() < there[0].norm()  # the mean variance is over three, not four of which one is 0
    torch.testing.assert_close(missing[G:], there[G:])


def test_the_teacher_is_asked_once_and_needs_a_graph(latents: Tensor) -> None:
    """The teacher is asked once, whoever asks first; without a graph, carrying back is refused."""
    asked = []

    def counted(x_t: Tensor, sigma: Tensor) -> Tensor:
        asked.append(len(x_t))
        return teacher(x_t, sigma)

    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=lambda _role: counted,
        min_time=0.1,
        max_time=0.9,
        carries_back=True,
    )
    batch = RewardBatch(latents=latents, prompts=[""] * 8, group_size=G, decode=lambda x: x, context=context)
    assert not context.renoise(latents, G).x_0("teacher").requires_grad
    for _ in range(2):
        tilted(RewardOutput(torch.arange(8.0), torch.ones_like(latents)), batch, "group")
    assert asked == [8]
    plain = batch_of(latents, carries_back=False).require_context("x").renoise(latents, G)
    with pytest.raises(RewardError, match="keeps no graph of the teacher"):
        plain.carry_back(torch.ones_like(latents))


def test_graphs_go_with_their_batch(latents: Tensor) -> None:
    """Nothing waits for the garbage collector: a teacher's graph is most of what a step holds."""
    batch = batch_of(latents)
    renoised = weakref.ref(batch.require_context("x").renoise(latents, G))
    gc.disable()
    try:
        assert renoised() is not None
        del batch
        assert renoised() is None
    finally:
        gc.enable()


def test_the_guided_teacher_is_the_one_that_is_tilted(latents: Tensor) -> None:
    """With guidance the Jacobian is the guided denoiser's, from the same pair of passes as dm's."""
    pairs = []

    def pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        pairs.append(len(x_t))
        return 0.8 * x_t, 0.2 * x_t

    def guide(x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor) -> Tensor:
        return without + 3.0 * (with_prompt - without)

    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=lambda _role: teacher,
        min_time=0.1,
        max_time=0.9,
        guide=guide,
        denoiser_pair=pair,
        carries_back=True,
    )
    renoised = context.renoise(latents, G)
    torch.testing.assert_close(renoised.x_0("teacher"), 2.0 * renoised.x_t)
    assert not any(part.requires_grad for part in renoised.teacher_pair())
    sigma = renoised.sigma.reshape(-1, 1, 1)
    torch.testing.assert_close(renoised.carry_back(latents), sigma**2 / (1 - sigma) * 2.0 * latents)
    assert pairs == [8]


# ---- In a run -------------------------------------------------------------------------------------------------------


def run(make_trainer: Make, folder: Path, rewards: Any, **settings: Any) -> RDMTrainer:
    """Train for a few bold steps."""
    given: dict[str, Any] = {"reward_route": "tilt", "max_steps": 3, "learning_rate": 2e-3, "critic_steps": 1}
    trainer = make_trainer(folder, rewards, **(given | settings))
    trainer.train()
    return trainer


def student_of(trainer: RDMTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parameters_of("student")]


def same(one: RDMTrainer, other: RDMTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(student_of(one), student_of(other), strict=True))


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_a_run_of_both_kinds(make_trainer: Make, tmp_path: Path, losses_of: Losses, sampler: str) -> None:
    """No policy loss, no rollout to the end, no forward pass beyond dm's own, and nothing random is needed."""
    settings = {"sampler": sampler, "weighting": "balance"}
    plain = run(make_trainer, tmp_path / "plain", "dm", **settings)
    before = student_of(plain)
    trainer = run(make_trainer, tmp_path / "tilt", ["dm", "0.5*legibility", (brightness, 0.5)], **settings)
    row = losses_of(trainer)[-1]
    assert "loss/policy" not in row
    assert min(row["legibility/pull"], row["brightness/pull"], row["weights/brightness"]) > 0
    for name in ("teacher_forwards", "student_forwards", "rollouts", "fake_forwards"):
        assert trainer.costs()[f"cost/{name}"] == plain.costs()[f"cost/{name}"]
    assert any(not torch.equal(a, b) for a, b in zip(before, student_of(trainer), strict=True))
    frozen = [parameter for name, parameter in trainer.roles.backbone.named_parameters() if "lora" not in name]
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("rewards", ["dm + 0*legibility", ["dm", (brightness, 0.0)]], ids=["gradient", "scores"])
def test_a_zero_weight_changes_nothing(make_trainer: Make, tmp_path: Path, losses_of: Losses, rewards: Any) -> None:
    """GNDMR with zero weights is GNDM, bit for bit (law 6), on this route too."""
    watching = run(make_trainer, tmp_path / "b", rewards)
    assert same(run(make_trainer, tmp_path / "a", "dm"), watching)
    assert not any(name.endswith("/pull") and name != "dm/pull" for name in losses_of(watching)[-1])


def test_units_are_a_setting(make_trainer: Make, tmp_path: Path) -> None:
    """`scale_rewards` reaches the tilt."""
    rewards = ["dm", (brightness, 0.5)]
    runs = [run(make_trainer, tmp_path / scale, rewards, scale_rewards=scale) for scale in ("group", "batch", "none")]
    assert not same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_weight_of_zero_until_the_cold_start_ends(make_trainer: Make, tmp_path: Path) -> None:
    """Keeping the teacher's graph changes no bit of dm's own gradient."""
    cold = run(make_trainer, tmp_path / "a", "dm + 0.5*legibility", weighting="fixed[cold_start=10]")
    assert same(cold, run(make_trainer, tmp_path / "b", "dm"))


def test_recomputed_blocks_change_nothing(make_trainer: Make, tmp_path: Path) -> None:
    """Activation checkpointing reaches the teacher's graph as well, under its role; each reward walks it once more."""
    rewards = ["dm + 0.5*legibility", (Bright(), 0.2)]
    one, other = (
        run(make_trainer, tmp_path / str(again), rewards, activation_checkpointing=again) for again in (False, True)
    )
    for a, b in zip(student_of(one), student_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "max_steps": 4},
        {"gradient_accumulation_steps": 2},
        {"guidance_scale": 2.0},
        {"bf16": True},
        {"scale_rewards": "none"},
        {"normalization": "group", "spread": "shared"},
    ],
    ids=["reuse", "accumulation", "guided", "bf16", "native units", "group"],
)
def test_it_goes_with_the_other_settings(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, settings: dict[str, Any]
) -> None:
    """Each of these runs, and both rewards pull."""
    trainer = run(make_trainer, tmp_path, ["dm", "0.2*legibility", (brightness, 0.2)], **settings)
    row = losses_of(trainer)[-1]
    assert min(row["legibility/pull"], row["brightness/pull"]) > 0


def test_it_needs_no_distribution_matching(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """Alone, a tilt fine-tunes along the teacher's posterior; the teacher is asked for it."""
    trainer = run(make_trainer, tmp_path, [(brightness, 1.0)])
    assert losses_of(trainer)[-1]["brightness/pull"] > 0
    assert trainer.costs()["cost/teacher_forwards"] == 3 * 8


class Bright(Reward):
    """Brightness with a gradient, for prompts that are not those of zeros."""

    name = "bright"
    capabilities = Capabilities(gradient="autograd", prompts=True)

    def score(self, batch: RewardBatch) -> Tensor:
        left_out = torch.tensor(["zero" in prompt for prompt in batch.prompts])
        return batch.images.mean(dim=(1, 2, 3)).masked_fill(left_out, NAN)


class BrightScores(Bright):
    """The same, without a gradient."""

    capabilities = Capabilities(prompts=True)


@pytest.mark.parametrize("kind", [Bright, BrightScores], ids=["gradient", "scores"])
def test_rewards_may_not_apply(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, kind: Callable[[], Reward]
) -> None:
    """NaN scores of some prompts neither stop a run nor reach its loss."""
    prompts = ["the digit zero", "the digit one"]
    trainer = run(make_trainer, tmp_path, ["dm", (kind(), 0.5)], prompts=prompts)
    rows = losses_of(trainer)
    assert sum(row[name] for row in rows for name in row if name.endswith("/nan")) > 0
    assert all(row["loss"] == row["loss"] for row in rows)


def test_scores_need_a_group(make_trainer: Make, tmp_path: Path) -> None:
    """One sample per prompt leaves nothing to compare with; a gradient needs no group."""
    with pytest.raises(ConfigError, match="'brightness' has no gradient, so samples of one prompt are compared"):
        run(make_trainer, tmp_path, ["dm", (brightness, 0.5)], num_generations=1)
    run(make_trainer, tmp_path, "dm + 0.5*legibility", num_generations=1)


def test_resuming(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """A resumed run is the uninterrupted one, bit for bit; another route is another run."""
    rewards = ["dm", "0.5*legibility", (brightness, 0.5)]
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "weighting": "balance"}
    whole = run(make_trainer, tmp_path, rewards, **settings)
    resumed = make_trainer(tmp_path, rewards, reward_route="tilt", learning_rate=2e-3, critic_steps=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole, resumed)
    assert losses_of(whole)[-1] == losses_of(resumed)[-1]
    other = make_trainer(tmp_path, rewards, learning_rate=2e-3, critic_steps=1, **settings)
    with pytest.raises(CheckpointError, match=r"by the routes \['gradient', 'tilt', 'tilt'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
