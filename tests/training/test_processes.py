"""Two processes of four samples are one of eight, here as threads, each with its networks; nobody disturbs it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_runs import brightness, same_bits, weights_of_roles
from peft import LoraConfig
from torch import Tensor
from transformers import set_seed

from rdm_sdk import RDMConfig, RDMTrainer, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.method.draws import Draws
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.training.weighting import make_weighting

SETTINGS: dict[str, Any] = {
    "num_generations": 2,
    "max_sequence_length": 4,
    "guidance_scale": 1.0,
    "critic_steps": 1,
    "use_cpu": True,
    "num_iterations": 2,
    "scale_rewards": "batch",
    "reward_route": "tilt[brightness=advantage]",
    "min_effective_sample_size": 0.0,
}


class Threads:
    """Two threads that wait for each other, as processes do."""

    def __init__(self) -> None:
        self.slots: list[Any] = [None, None]
        self.barrier = threading.Barrier(2, timeout=60)

    def gather(self, index: int, value: object) -> list[Any]:
        self.slots[index] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def reduce(self, index: int, tensor: Tensor, how: str) -> Tensor:
        total: Tensor = torch.stack(self.gather(index, tensor.clone())).sum(0)
        return total / 2 if how == "mean" else total

    def process(self, index: int) -> Processes:
        return Processes(2, partial(self.reduce, index), partial(self.gather, index), index)


def step_of(processes: Processes) -> DistillationStep:
    """Return the step of a run on the embedded teacher, always from the same weights."""
    settings = RDMConfig(**SETTINGS)
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    set_seed(0)
    lora = LoraConfig(r=4, lora_alpha=4)
    family.add_roles({"student": lora, "fake": lora}, {}, settings.steps_told)
    models = RunModels(family, settings, torch.device("cpu"))
    rewards = resolve_rewards(["dm + 0.3*legibility", (brightness, 0.2)], None, settings.reward_route)
    judge = Judge(models, rewards, settings, processes=processes)
    return DistillationStep(judge, settings, make_weighting("balance[decay=0.5]"))


def trained(step: DistillationStep, prompts: list[str]) -> tuple[list[Tensor], dict[str, float], dict[str, float]]:
    """Take three steps with plain gradient descent; return student and critic, the weights, and the figures."""
    student, critic = step.models.parameters_of("student"), step.models.parameters_of("fake")
    for number in range(3):
        step.begin([{"prompts": prompts, "columns": {}}], number)
        for loss in step.critic_losses(0):
            loss.backward()
        step.end_critics()
        descend(critic, 0.1)
        step.student_loss(0).loss.backward()
        step.end(number + 1)
        descend(student, 10.0)
    return [*student, *critic], step.weights, step.monitor.averages(step.processes)


@torch.no_grad()
def descend(parameters: list[torch.nn.Parameter], rate: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(rate * parameter.grad)
            parameter.grad = None


def test_two_of_four_are_one_of_eight() -> None:
    """Weights to 1e-6, and the adaptive weights: with fields, tilts, scores, statistics of the batch, reuse."""
    prompts = [prompt for prompt in digits.prompts()[:4] for _ in range(2)]
    threads = Threads()
    steps = [step_of(Processes()), *(step_of(threads.process(index)) for index in range(2))]
    before = [p.detach().clone() for p in steps[0].models.parameters_of("student")]
    torch.manual_seed(3)
    alone, weights, figures = trained(steps[0], prompts)
    torch.manual_seed(3)
    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(trained, steps[1:], (prompts[:4], prompts[4:])))
    for parameters, others, logged in shares:
        torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-6)
        assert others == pytest.approx(weights, rel=1e-4)
        for name in ("ratio/ess", "rewards/legibility/mean", "legibility/pull", "loss/policy", "loss/pathwise"):
            assert logged[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-6), name
    assert weights["brightness"] not in (0.0, 0.2)
    moved = zip(before, steps[0].models.parameters_of("student"), strict=True)
    assert max(float((a - b.detach()).abs().max()) for a, b in moved) > 1e-3  # far beyond the bound


@pytest.mark.parametrize("count", [1, 2, 4])
def test_numbers_depend_on_the_place_in_the_whole_batch(count: int) -> None:
    """However many processes share a batch of 8, put together they hold the numbers that one draws."""
    chosen = torch.tensor([True, False, True, True, False, False, True, True])

    def drawn(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        draws.generator = torch.Generator().manual_seed(5)
        rows, some = draws.normal_for(chosen, (2, 3), torch.float32)
        return draws.normal(8 // draws.count, (5,), torch.device("cpu")), rows + draws.index * 8 // draws.count, some

    parts = [drawn(Draws(index, count)) for index in range(count)]
    for got, expected in zip(zip(*parts, strict=True), drawn(Draws()), strict=True):
        assert torch.equal(torch.cat(got), expected)


def disturbing(images: Tensor, prompts: list[str]) -> Tensor:
    """Score brightness, after doing to every global random state what careless code does."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the point of it
    torch.randn(7)
    return brightness(images, prompts)


def test_a_reward_does_not_touch_the_runs_noise(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """With a reward that reseeds and draws at every call, the run is bit for bit as without."""
    ends = []
    for number, reward in enumerate((brightness, disturbing)):
        trainer = make_trainer(tmp_path / str(number), ["dm", (reward, 0.5)], critic_steps=1, learning_rate=1e-3)
        trainer.train()
        ends.append((weights_of_roles(trainer, "student", "fake"), torch.get_rng_state()))
    assert same_bits(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_what_a_reward_draws_is_not_the_runs_noise(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """The global state inside a step repeats neither the rollouts' noise nor what it gave in the step before."""
    seen: list[Tensor] = []

    def watching(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(torch.randn(64))
        return brightness(images, prompts)

    trainer = make_trainer(tmp_path, ["dm", (watching, 0.5)], critic_steps=1)
    noise: list[Tensor] = []
    draw = trainer.step.rollouts.draws.normal
    trainer.step.rollouts.draws.normal = lambda *args: noise.append(draw(*args)) or noise[-1]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert not any(torch.isin(drawn, one.flatten()).any() for drawn in seen for one in noise)
