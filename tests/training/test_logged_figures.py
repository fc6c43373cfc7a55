"""What rewards log themselves, in a run: under their names, per optimizer step, over all that they were shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rollouts import bits, experience
from torch import Tensor

from rdm_sdk import RDMTrainer, RewardBatch, declares
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.training.monitor import Monitor
from rdm_sdk.training.redistribution import read_share
from rdm_sdk.training.rollouts import rollouts_path, write_rollouts
from rdm_sdk.types import select_steps

Make = Callable[..., RDMTrainer]


def rows_of(trainer: RDMTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def scored(images: Tensor, prompts: list[str], step: int | None, log: Any) -> list[float]:
    """Asked once per rollout; logs the step, and a value for the first half of each call alone."""
    log("step", -1 if step is None else step)
    log("half", [1.0 if row < len(images) // 2 else None for row in range(len(images))])
    return [float(image.mean()) for image in images]


@declares(gradient="autograd")
def graded(images: Tensor, prompts: list[str], step: int | None, log: Any) -> Tensor:
    log("step", -1 if step is None else step)
    log("light", images.mean(dim=(1, 2, 3)))
    return images.mean(dim=(1, 2, 3))


def watched(images: Tensor, prompts: list[str], step: int | None, log: Any) -> list[float]:
    log("step", -1 if step is None else step)
    return [float(image.mean()) for image in images]


class Critic(DistributionMatching):
    """Logs what only the critic's training knows, and something beside its field."""

    def training_loss(self, batch: RewardBatch) -> Tensor:
        batch.log("critic_step", -1 if batch.step is None else batch.step)
        return super().training_loss(batch)

    def field(self, batch: RewardBatch) -> Any:
        batch.log("step", -1 if batch.step is None else batch.step)
        return super().field(batch)


@pytest.mark.parametrize("route", ["gradient", "tilt"])
def test_figures_and_steps_of_every_kind_of_reward(make_trainer: Make, tmp_path: Path, route: str) -> None:
    """By its gradient, by its scores, watched, with a critic; in chunks and micro-batches; `evaluate()` has no step."""
    critic = Critic()
    critic.name = "dm"
    rewards = [critic, (scored, 0.1), (graded, 0.1), (watched, 0)]
    settings = {"gradient_accumulation_steps": 2, "reward_batch_size": 4, "reward_route": route, "max_steps": 3}
    trainer = make_trainer(tmp_path, rewards, eval_dataset=["a zero", "a one"], **settings)
    trainer.train()
    for step, row in enumerate(rows_of(trainer)):
        for name in ("dm", "scored", "graded", "watched"):
            assert row[f"rewards/{name}/step"] == step, name
        assert row["rewards/dm/critic_step"] == step
        assert row["rewards/scored/half"] == 1  # the others have no value, so they are in no mean
        assert row["rewards/graded/light"] == pytest.approx(row["rewards/graded/mean"], rel=1e-5)
    metrics = trainer.evaluate()
    assert [metrics[f"eval_rewards/{name}/step"] for name in ("scored", "graded", "watched")] == [-1, -1, -1]
    assert metrics["eval_rewards/graded/light"] == pytest.approx(metrics["eval_rewards/graded/mean"], rel=1e-5)


def test_a_rollout_that_is_used_again_brings_its_figures_along(make_trainer: Make, tmp_path: Path) -> None:
    """The reward is not asked again, so its step is that of its scores."""
    trainer = make_trainer(tmp_path, ["dm", (scored, 0.1)], num_iterations=2, max_steps=4)
    trainer.train()
    assert [row["rewards/scored/step"] for row in rows_of(trainer)] == [0, 0, 2, 2]


def test_a_mean_over_all_processes() -> None:
    """Processes that know of more samples count for more; one that knows of none counts for nothing."""
    monitors = [Monitor() for _ in range(3)]
    for monitor, values in zip(monitors, ([1.0, 1.0, 4.0], [torch.nan, 8.0], [torch.nan]), strict=True):
        monitor.logged("ink", {"blots": torch.tensor(values)})
        monitor._read()
    (name,) = monitors[0]._values
    sums = [{name: (sum(v * n for v, n in m._values[name]), sum(n for _, n in m._values[name]))} for m in monitors[:2]]
    assert not monitors[2]._values

    class Together:
        @staticmethod
        def gather(own: Any) -> list[Any]:
            return sums

    assert monitors[0].averages(Together()) == {"rewards/ink/blots": pytest.approx(14 / 4)}  # type: ignore[arg-type]


def test_stored_figures_are_shared_out_anew(tmp_path: Path) -> None:
    """From two processes to one and back, each sample keeps its own; what one has not logged is NaN."""
    shares = [
        replace(experience(seed, scored=("first",)), plan=torch.zeros(2, 8, dtype=torch.int64)) for seed in (0, 1)
    ]
    shares[1] = replace(shares[1], start=4)
    del shares[1].scored["first"].logged["ink"]  # type: ignore[attr-defined]
    for index, share in enumerate(shares):
        write_rollouts(rollouts_path(tmp_path, index), [share])
    (whole,) = read_share(tmp_path, 2, 0, 1, torch.device("cpu"))
    ink = whole.scored["first"].logged["ink"]
    assert bits(ink[:4]) == bits(shares[0].scored["first"].logged["ink"])
    assert ink[4:].isnan().all()
    (quarter,) = read_share(tmp_path, 2, 0, 4, torch.device("cpu"))
    assert bits(quarter.scored["first"].logged["ink"]) == bits(ink[:2])


def test_another_number_of_processes_shares_every_sample_out_as_it_is(tmp_path: Path) -> None:
    """Each at its own step; scores of a reward that a process has skipped are NaN for its samples."""
    plan = torch.randint(3, (2, 8), generator=torch.Generator().manual_seed(0))
    scored = ("first",), ("second", "first")
    shares = [replace(experience(i, scored=scored[i]), plan=plan, start=4 * i) for i in (0, 1)]
    for index, share in enumerate(shares):
        write_rollouts(rollouts_path(tmp_path, index), [share])
    for index in range(4):
        (part,) = read_share(tmp_path, 2, index, 4, torch.device("cpu"))
        source, rows = shares[index // 2], slice(index % 2 * 2, index % 2 * 2 + 2)
        assert part.prompts == source.prompts[rows]
        x_0 = select_steps(source.rollout.x_0, source.steps)
        found = (part.steps, part.states, part.x_0, part.weights, part.scored["first"].scores)
        wanted = (source.steps, source.states, x_0, source.weights, source.scored["first"].scores)
        for one, other in zip(found, wanted, strict=True):
            assert bits(one) == bits(other[rows])
        second = part.scored["second"].scores
        assert second.isnan().all() if index < 2 else bits(second) == bits(source.scored["second"].scores[rows])


def test_a_micro_batch_without_random_steps_has_no_clipped_share(make_trainer: Make, tmp_path: Path) -> None:
    """It is a share of nothing, and takes no part in the average until the next log."""

    def ink(images: Tensor, prompts: list[str]) -> list[float]:
        return (1 - images.mean(dim=(1, 2, 3))).tolist()

    settings = {"num_inference_steps": 2, "spread": "shared", "max_steps": 8, "logging_steps": 8, "critic_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "num_generations": 4}
    trainer = make_trainer(tmp_path, ["dm", (ink, 0.1)], **settings)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "ratio/clip_fraction" in row]
    assert 0 <= row["ratio/clip_fraction"] <= 1
