"""The teacher's flow as a reward: where it leads, for which samples, and that a run learns from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_calls import size_of
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import RDMConfig, RDMTrainer, RewardBatch, RewardError
from rdm_sdk.families.load import load_family
from rdm_sdk.method.noise import FlowSchedule, NoiseSchedule, VariancePreservingSchedule, per_sample
from rdm_sdk.method.sampling import follow_flow
from rdm_sdk.rewards.context import DiffusionContext, Origin
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.flow import TeacherFlow
from rdm_sdk.types import Denoiser, RewardOutput

MEAN, DEVIATION = 0.7, 0.5
LEVELS = (1.0, 0.6, 0.3)


def exact_denoiser(schedule: NoiseSchedule) -> Denoiser:
    """Return E[x_0 | x_t] of Gaussian data."""

    def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
        s = per_sample(sigma, x_t)
        a = schedule.alpha(s)
        gain = a * DEVIATION**2 / (a.square() * DEVIATION**2 + s.square())
        return MEAN + gain * (x_t - a * MEAN)

    return denoise


def exact_end(schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return where the flow of Gaussian data ends: it keeps how many deviations a value is off the mean."""
    s = per_sample(sigma, x_t)
    a = schedule.alpha(s)
    return MEAN + DEVIATION * (x_t - a * MEAN) / (a.square() * DEVIATION**2 + s.square()).sqrt()


@pytest.mark.parametrize("schedule", [FlowSchedule(), VariancePreservingSchedule()], ids=["flow", "ddpm"])
def test_the_flow_ends_where_it_must(schedule: NoiseSchedule) -> None:
    x_t = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.95, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    wanted = exact_end(schedule, x_t, sigma)
    errors = [
        (follow_flow(exact_denoiser(schedule), schedule, x_t, sigma, steps) - wanted).abs().amax((1, 2))
        for steps in (50, 100, 800)
    ]
    assert (errors[-1] < 3e-3).all()
    assert ((errors[0] / errors[1] - 2).abs() < 0.2).all()  # of first order: half the step, half the error


def test_one_step_is_the_prediction_and_levels_fall_evenly() -> None:
    asked: list[Tensor] = []

    def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return exact_denoiser(FlowSchedule())(x_t, sigma)

    x_t, sigma = torch.randn(2, 3), torch.tensor([0.8, 0.4])
    once = follow_flow(denoise, FlowSchedule(), x_t, sigma, 1)
    torch.testing.assert_close(once, exact_denoiser(FlowSchedule())(x_t, sigma))
    asked.clear()
    follow_flow(denoise, FlowSchedule(), x_t, sigma, 4)
    even = sigma * torch.tensor([1.0, 0.75, 0.5, 0.25])[:, None]
    torch.testing.assert_close(torch.stack(asked), even, rtol=0, atol=1e-3)  # the lowest level of a flow is 1e-3


def judged(steps: Tensor, reward: TeacherFlow, told: bool = True) -> tuple[RewardOutput, Tensor, list[int]]:
    """Judge samples made at steps k of three by the exact flow; returns the states, too, and how many were asked of."""
    generator = torch.Generator().manual_seed(1)
    x_0, states = (torch.randn(len(steps), 2, 3, generator=generator) for _ in range(2))
    levels, asked = torch.tensor(LEVELS)[steps], list[int]()

    def teacher_of(rows: Tensor) -> Denoiser:
        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            asked.append(len(rows))
            torch.testing.assert_close(len(x_t), len(rows))
            return exact_denoiser(FlowSchedule())(x_t, sigma)

        return denoise

    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=lambda role: exact_denoiser(FlowSchedule()),
        min_time=0.02,
        max_time=0.98,
        origin=Origin(states, levels, len(LEVELS) - 1 - steps, teacher_of) if told else None,
    )
    batch = RewardBatch(
        latents=x_0, prompts=["a"] * len(steps), group_size=len(steps), decode=lambda x: x, context=context
    )
    output = evaluate_rewards({"flow": reward}, batch).outputs["flow"]
    wanted = exact_end(FlowSchedule(), states, levels) - x_0
    return output, wanted, asked


@pytest.mark.parametrize("last_steps", [1, 2, 3, 9])
def test_the_gradient_points_to_the_flows_end_from_the_last_steps_alone(last_steps: int) -> None:
    steps = torch.tensor([0, 1, 2, 2, 1, 2])
    output, wanted, asked = judged(steps, TeacherFlow(last_steps=last_steps, num_inference_steps=200))
    meant = steps >= len(LEVELS) - last_steps
    torch.testing.assert_close(output.gradient[meant], wanted[meant], rtol=0, atol=0.02)
    assert (output.gradient[~meant] == 0).all()
    assert torch.equal(output.scores.isnan(), ~meant)
    torch.testing.assert_close(output.scores[meant], -0.5 * output.gradient[meant].square().flatten(1).sum(1))
    assert asked == [int(meant.sum())] * 200  # nothing is computed for the others
    assert (output.magnitude > 0).all()


def test_a_batch_without_a_last_step_is_no_error_and_asks_as_often() -> None:
    """On several processes with sharded weights, all have to ask the network as often."""
    output, _, asked = judged(torch.tensor([0, 1, 1, 0]), TeacherFlow(num_inference_steps=3))
    assert output.scores.isnan().all()
    assert (output.gradient == 0).all()
    assert asked == [1, 1, 1]


def test_samples_of_no_run_are_refused() -> None:
    with pytest.raises(RewardError, match="from which states"):
        judged(torch.tensor([2, 2]), TeacherFlow(), told=False)


@pytest.mark.parametrize("options", [{"last_steps": 0}, {"num_inference_steps": 0}, {"below": 0.3}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RewardError, match="flow"):
        TeacherFlow(**options)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=() if kind in ("PixArtSigmaPipeline", "StableDiffusion3Pipeline") else pytest.mark.slow
        )
        for kind in sorted(TINY_PIPELINES)
    ],
)
def test_a_run_learns_it(kind: str, small_config: Callable[..., RDMConfig], tmp_path: Path) -> None:
    """From `flow` alone, without a critic, the only step's distance to the flow's end falls, in every family.

    At guidance 2 where the family has guidance.
    """
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    args = small_config(
        tmp_path,
        max_steps=20,
        learning_rate=1e-3,
        num_inference_steps=1,
        logging_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        guidance_scale=1.0 if family.guidance == "none" else 2.0,
        **size_of(family),
    )
    trainer = RDMTrainer(family, "flow[num_inference_steps=3]", args, ["one", "two", "three", "four"] * 4)
    trainer.train()
    distances = [entry["flow/distance"] for entry in trainer.state.log_history if "flow/distance" in entry]
    assert len(distances) == 20
    assert sum(distances[-5:]) < 0.7 * sum(distances[:5]), distances


def test_its_scores_act_as_advantages_too(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """Endpoints are all samples of the last step, so that none is without a score."""
    trainer = make_trainer(tmp_path, "dm + flow", reward_route="advantage", max_steps=1, logging_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/flow/applies"] == 1
    assert logged["rewards/flow/mean"] < 0 < logged["rewards/flow/std"]
    assert logged["loss/policy"] != 0


def test_the_run_tells_states_levels_and_the_guided_teacher(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, guidance_scale=3.0)
    step = trainer.step
    prompts = [{"prompts": ["one", "two", "three", "four"], "columns": {}}]
    step.begin(prompts, 0)
    experience, _ = step.rollouts.replay(0)
    origin = step.judge.batch(experience.samples).context.origin
    assert torch.equal(origin.states, experience.states)
    assert torch.equal(origin.levels, trainer.models.policy.levels(experience.steps))
    assert torch.equal(origin.steps_left, trainer.models.policy.num_steps - 1 - experience.steps)
    rows = torch.tensor([2, 0])
    part = origin.teacher_of(rows)(origin.states[rows], origin.levels[rows])
    whole = trainer.models.denoiser("teacher", experience.condition)(origin.states, origin.levels)
    torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)
