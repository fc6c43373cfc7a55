"""The method's step in a loop that is not Trainer's: the page's own lines, and the same bits as `RDMTrainer`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, set_seed
from watched_rewards import Judge as Scored

import rdm_sdk.training.step
from rdm_sdk import RDMConfig, RDMTrainer, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.optimizers import CriticOptimizer
from rdm_sdk.training.step import DistillationStep

PAGE = Path(__file__).parents[2] / "docs" / "step.md"
SPEC = "dm + 0.5*legibility"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The block of `docs/step.md`, to the letter: every step reports both rewards' pulls, and the student moves."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    printed = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d ", line)]
    assert [line.split()[0] for line in printed] == ["0", "1", "2"]
    assert all("'dm'" in line and "'legibility'" in line for line in printed)
    moved = [p for n, p in names["models"].roles.parameters_of("student").items() if "lora_B" in n]
    assert any(bool(p.any()) for p in moved)
    assert all(bool(p.isfinite().all()) for p in moved)


class FirstStep:
    """Takes down what a trainer's first optimizer step starts from: its micro-batches and the random state."""

    def __init__(self, trainer: RDMTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.window: list[dict[str, Any]] = []
        self.random = torch.zeros(0)
        plain = trainer.step.begin

        def begin(window: Any, step: int) -> None:
            self.window, self.random = list(window), torch.get_rng_state()
            plain(window, step)

        monkeypatch.setattr(trainer.step, "begin", begin)


def step_alone(args: RDMConfig, first: FirstStep) -> dict[str, Tensor]:
    """Return every trained weight after one step with optimizers and a loop of the test's."""
    set_seed(args.seed)
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=args.max_sequence_length)
    set_seed(args.seed)
    lora = LoraConfig(r=16, lora_alpha=16)
    family.add_roles({"student": lora, "fake": lora}, {}, args.steps_told)
    models = RunModels(family, args, torch.device("cpu"))
    models.encode.know(digits.prompts())  # as a trainer's, so that they are encoded in the same batches
    step = DistillationStep(Judge(models, resolve_rewards(SPEC), args), args)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    student = kind([{"params": models.parameters_of("student"), "weight_decay": args.weight_decay}], **options)
    critic = CriticOptimizer(args, family.roles)
    assert critic is not None
    torch.set_rng_state(first.random)
    step.begin(first.window, 0)
    for turn in range(args.critic_steps):
        for loss in step.critic_losses(turn):
            loss.backward()
        step.end_critics()
        critic.step()
    for position in range(len(first.window)):
        (step.student_loss(position).loss / len(first.window)).backward()
    step.end(1)
    torch.nn.utils.clip_grad_norm_(models.parameters_of("student"), args.max_grad_norm)
    student.step()
    return weights_of(family.roles)


def weights_of(roles: Any) -> dict[str, Tensor]:
    return {f"{role}.{name}": p for role in ("student", "fake") for name, p in roles.parameters_of(role).items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_of_ones_own_gives_the_trainers_bits(
    make_digits_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """From the same seed, prompts and random state, one step ends with the same weights of student and critic."""
    settings = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3}
    trainer = make_digits_trainer(tmp_path, SPEC, **settings)
    before = {name: p.detach().clone() for name, p in weights_of(trainer.roles).items()}
    first = FirstStep(trainer, monkeypatch)
    trainer.train()
    assert len(first.window) == accumulation
    expected, got = weights_of(trainer.roles), step_alone(trainer.args, first)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    for role in ("student", "fake"):
        assert any(not torch.equal(before[n], p) for n, p in expected.items() if n.startswith(role))


def test_the_critics_loss_is_the_mean_over_micro_batches(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is back-propagated in one update adds up to the mean, so that accumulation leaves clipping as it is."""
    said: list[float] = []
    plain = DistributionMatching.training_loss

    def training_loss(self: DistributionMatching, batch: Any) -> Tensor:
        loss = plain(self, batch)
        said.append(loss.item())
        return loss

    monkeypatch.setattr(DistributionMatching, "training_loss", training_loss)
    trainer = make_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, critic_steps=1)
    taught: list[float] = []
    losses = trainer.step.critic_losses

    def critic_losses(turn: int) -> Any:
        for loss in losses(turn):
            taught.append(loss.item())
            yield loss

    monkeypatch.setattr(trainer.step, "critic_losses", critic_losses)
    trainer.train()
    assert len(said) == 2
    assert sum(taught) == pytest.approx(sum(said) / 2, rel=1e-5)


def test_no_gradient_of_a_critic_outlives_its_update(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """The next update goes by its own gradient alone."""
    trainer = make_trainer(tmp_path, max_steps=1, critic_steps=2)
    left: list[bool] = []
    begin = trainer.step.critic_losses

    def critic_losses(turn: int) -> Any:
        left.append(any(p.grad is not None and bool(p.grad.any()) for p in trainer.parameters_of("fake")))
        return begin(turn)

    trainer.step.critic_losses = critic_losses
    trainer.train()
    assert left == [False, False]


def test_the_critics_rate_moves_with_the_student(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """Once per optimizer step of the student, however often the critics are updated in it."""
    schedule = {"lr_scheduler_type": "linear", "critic_learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, max_steps=4, critic_steps=3, **schedule)
    rates: list[float] = []
    begin = trainer.step.critic_losses

    def critic_losses(turn: int) -> Any:
        assert trainer.critic_optimizer is not None
        rates.append(trainer.critic_optimizer.learning_rate)
        return begin(turn)

    trainer.step.critic_losses = critic_losses
    trainer.train()
    assert rates == pytest.approx([1e-3 * (1 - step / 4) for step in range(4) for _ in range(3)])


def test_the_students_loss_is_the_sum_of_both_routes(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, losses_of: Any
) -> None:
    """What moves x_0 and what makes transitions likelier stand side by side, neither of them halved by the other."""
    trainer = make_trainer(tmp_path, ["dm", (Scored(), 0.5)], max_steps=1)
    losses: list[float] = []
    plain = trainer.step.student_loss

    def student_loss(position: int) -> Any:
        result = plain(position)
        losses.append(result.loss.item())
        return result

    trainer.step.student_loss = student_loss
    trainer.train()
    (row,) = losses_of(trainer)
    assert row["loss/policy"] != 0 < row["loss/pathwise"]
    assert losses == [pytest.approx(row["loss/pathwise"] + row["loss/policy"], rel=1e-5)]


def test_scores_count_by_the_weight_of_the_step(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through cold start and ramp, advantages are as large as the weight at that step, not as the one in the spec."""
    sizes: list[float] = []
    plain = DistillationStep._normalize_scores

    def normalized(self: DistillationStep) -> Any:
        (advantages,) = found = plain(self)
        sizes.append(0.0 if advantages.together is None else advantages.together.reshape(-1, 4).std(1).mean().item())
        return found

    monkeypatch.setattr(DistillationStep, "_normalize_scores", normalized)
    rewards = ["dm", (Scored(), 0.8)]
    make_trainer(tmp_path, rewards, max_steps=4, critic_steps=1, weighting="fixed[cold_start=1,ramp=1]").train()
    assert sizes == pytest.approx([0.0, 0.4, 0.8, 0.8], rel=0.1)  # but for eps


def test_samples_without_a_density_count_in_the_policy_loss(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 1 it is minus the sum of the others' advantages over all samples and values, as a field's average is."""
    seen: list[tuple[Tensor, float]] = []
    plain = rdm_sdk.training.step.policy_loss

    def policy_loss(log_ratios: Tensor, advantages: Tensor, *rest: Any) -> Any:
        result = plain(log_ratios, advantages, *rest)
        seen.append((advantages, result.loss.item()))
        return result

    monkeypatch.setattr(rdm_sdk.training.step, "policy_loss", policy_loss)
    trainer = make_trainer(tmp_path, ["dm", (Scored(), 0.5)], max_steps=1)
    trainer.train()
    ((advantages, loss),) = seen
    assert len(advantages) == 6  # two of eight samples are at the last step
    values = trainer.step.rollouts.experiences[0].x_0.numel()
    assert loss == pytest.approx(-float(advantages.sum()) / values, rel=1e-4)
    assert loss != 0


def test_each_micro_batch_has_its_own_advantages(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is better than its group's mean is made likelier, in the second micro-batch by the second one's scores."""
    seen: list[Tensor] = []
    plain = rdm_sdk.training.step.policy_loss

    def policy_loss(log_ratios: Tensor, advantages: Tensor, *rest: Any) -> Any:
        seen.append(advantages)
        return plain(log_ratios, advantages, *rest)

    monkeypatch.setattr(rdm_sdk.training.step, "policy_loss", policy_loss)
    trainer = make_trainer(tmp_path, ["dm", (Scored(), 0.5)], max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    for advantages, experience in zip(seen, trainer.step.rollouts.experiences, strict=True):
        (output,) = experience.scored.values()
        scores = output.scores.reshape(2, 4)
        better = (scores - scores.mean(1, keepdim=True)).flatten()[experience.steps < 3]
        assert torch.equal(better.sign(), advantages.sign())
        assert bool(better.any())
