"""`RDMTrainer` as a Trainer: callbacks, epochs, time scales, clipping, accumulation, precision, seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_runs import brightness, weights_of
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import (
    RDMConfig,
    digits,
)
from rdm_sdk.training.pictures import logged_pictures, too_many
from rdm_sdk.training.trackers import TellTrackers

Make = Callable[..., Any]
Losses = Callable[[Any], list[dict[str, float]]]


class Counting(TrainerCallback):
    """Counts steps and asks to stop after three."""

    def __init__(self) -> None:
        self.steps = self.logs = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        control.should_training_stop = self.steps == 3

    def on_log(self, *_: Any, **__: Any) -> None:
        self.logs += 1


def test_callbacks_and_max_steps_are_honored(make_trainer: Make, tmp_path: Path) -> None:
    """A run ends after `max_steps`, or when a callback says so; callbacks see each step and log."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    counting = Counting()
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[counting])
    trainer.train()
    assert trainer.state.global_step == counting.steps == 3
    assert counting.logs == 4  # three steps and the summary


def test_epochs_are_honored(make_trainer: Make, tmp_path: Path) -> None:
    """Without `max_steps`, two epochs of ten prompts in micro-batches of two groups are ten steps."""
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 10


def test_each_epoch_has_an_order_of_its_own(make_trainer: Make, tmp_path: Path) -> None:
    """Every epoch holds each prompt once, and two epochs differ in order."""
    seen: list[str] = []

    def watching(images: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts[::4])
        return brightness(images, prompts)

    make_trainer(tmp_path, ["dm", watching], max_steps=10).train()
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(digits.prompts())
    assert seen[:10] != seen[10:]


class OptimizerSteps(TrainerCallback):
    """Reads, at each optimizer step, how often each role's parameters have been stepped."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.read: list[tuple[int, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        optimizers = {"student": self.trainer.optimizer, "fake": self.trainer.critic_optimizer.optimizer}
        counts = [
            {int(own.state[p]["step"]) for p in self.trainer.parameters_of(role) if own.state.get(p)}
            for role, own in optimizers.items()
        ]
        self.read.append((max(counts[0]), max(counts[1])))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_time_scales(make_trainer: Make, tmp_path: Path, accumulation: int) -> None:
    """The critic takes `critic_steps` updates per student update, whatever the accumulation, at its own rate."""
    watch = OptimizerSteps()
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        critic_steps=3,
        learning_rate=1e-4,
        critic_learning_rate=5e-4,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    assert watch.read == [(1, 3), (2, 6)]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-4]
    assert [group["initial_lr"] for group in trainer.critic_optimizer.optimizer.param_groups] == [5e-4, 5e-3]


def test_clipping_is_per_role(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's gradient is clipped by its own limit, the student's by Trainer's, neither with the other."""
    norms: list[tuple[int, float]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watching(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        parameters = list(parameters)
        norms.append((sum(p.grad is not None for p in parameters), float(max_norm)))
        return clip(parameters, max_norm, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watching)
    trainer = make_trainer(tmp_path, max_grad_norm=0.25, critic_max_grad_norm=0.5, critic_steps=2, max_steps=1)
    with_gradient = len(trainer.parameters_of("fake"))
    trainer.train()
    assert [limit for _, limit in norms] == [0.5, 0.5, 0.25]
    assert all(0 < count <= with_gradient for count, _ in norms)


def test_accumulation_averages_micro_batches(make_digits_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """Two micro-batches of one group log a loss of the size of one, not twice it."""
    one = make_digits_trainer(tmp_path, "dm", max_steps=8)
    two = make_digits_trainer(tmp_path, "dm", max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for trainer in (one, two):
        trainer.train()
    sums = [sum(row["loss/pathwise"] for row in losses_of(t)) for t in (one, two)]
    assert 0.6 < sums[0] / sums[1] < 1.6
    for row in losses_of(two):
        assert row["loss"] == pytest.approx(row["loss/pathwise"], rel=1e-4)


def test_the_same_seed_gives_the_same_weights(make_trainer: Make, tmp_path: Path) -> None:
    """Two runs with one seed end with the same bits; another seed ends elsewhere."""
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(tmp_path, ["dm", brightness], seed=seed)
        trainer.train()
        runs.append(weights_of(trainer))
    first, again, other = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pictures_do_not_change_the_run(make_trainer: Make, tmp_path: Path) -> None:
    """`log_images` writes a PNG with three labeled rows every so many steps, and training goes on as without."""
    runs = []
    for every in (0, 2):
        trainer = make_trainer(tmp_path, log_images=every, max_steps=4)
        trainer.train()
        runs.append(weights_of(trainer))
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["step_000002.png", "step_000004.png"]
    with Image.open(files[0]) as picture:
        assert picture.format == "PNG"
        assert picture.height >= 3 * 64
        assert picture.width >= 10 * 64
    assert all(torch.equal(runs[1][name], p) for name, p in runs[0].items())


def test_pictures_can_be_bounded(make_trainer: Make, tmp_path: Path) -> None:
    """`log_images_limit` keeps the first, the last and even steps between; later steps that were there are left."""
    later = tmp_path / "images" / "step_000900.png"
    later.parent.mkdir()
    later.touch()
    make_trainer(tmp_path, log_images=1, log_images_limit=4, max_steps=5, critic_steps=1).train()
    assert [step for step, _ in logged_pictures(later.parent)] == [1, 2, 4, 5, 900]


def test_one_process_shows_them(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `save_on_each_node` others write pictures too, but trackers are those of the first."""
    shown: list[Path] = []
    monkeypatch.setattr(TellTrackers, "show", lambda self, path, step: shown.append(path))
    for first in (True, False):
        trainer = make_trainer(tmp_path / str(first), log_images=1, max_steps=1, critic_steps=1)
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda first=first: first)
        trainer.train()
        assert [step for step, _ in logged_pictures(tmp_path / str(first) / "images")] == [1]
    assert [path.parents[1].name for path in shown] == ["True"]


def test_pictures_are_left_out_evenly() -> None:
    """Whatever the number of pictures, as they come one after the other."""
    for most in (2, 3, 6, 20):
        kept: list[int] = []
        for step in range(10, 2001, 10):
            kept = [*kept, step]
            kept = [at for at in kept if at not in too_many(kept, 10, most)]
            assert len(kept) <= most
            assert (kept[0], kept[-1]) == (10, step)
            distances = {b - a for a, b in pairwise(kept[1:-1])}
            assert len(distances) <= 1
        assert len(kept) > most / 2


def test_bf16_runs_on_cpu(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """With bf16 the base is bfloat16, the trained weights and losses stay float32 and finite."""
    trainer = make_trainer(tmp_path, "dm + legibility", bf16=True, learning_rate=1e-2)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert trainer.family.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.isfinite(p).all() for p in after.values())
    assert all(row["loss"] == row["loss"] and row["grad_norm"] > 0 for row in losses_of(trainer))


def test_activation_checkpointing_gives_the_same_run(make_trainer: Make, tmp_path: Path) -> None:
    """Recomputing activations changes memory and time, not the weights."""
    runs = []
    for recompute in (False, True):
        trainer = make_trainer(tmp_path, "dm + legibility", activation_checkpointing=recompute, learning_rate=1e-3)
        assert trainer.family.backbone.is_gradient_checkpointing is False
        trainer.train()
        assert trainer.family.backbone.is_gradient_checkpointing is recompute
        runs.append(weights_of(trainer))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ({"activation_checkpointing": True}, True),
        ({"gradient_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
        ({}, False),
    ],
)
def test_activation_checkpointing_has_both_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, bool], on: bool
) -> None:
    """Before transformers had a field of the newer name, Trainer read the older one; a changed copy is as it says."""
    monkeypatch.setattr("rdm_sdk.training.inherited.TrainingArguments", object)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    config = RDMConfig(output_dir=str(tmp_path), **given)
    assert config.gradient_checkpointing is config.activation_checkpointing is on
    changed = replace(config, gradient_checkpointing=True)
    assert changed.gradient_checkpointing is changed.activation_checkpointing is True


def test_prompts_from_a_text_file(make_trainer: Make, tmp_path: Path) -> None:
    """A text file's path serves as training prompts."""
    (tmp_path / "prompts.txt").write_text("seven\n\ntwo\n", encoding="utf-8")
    trainer = make_trainer(tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))
    trainer.train()
    assert trainer.train_dataset["prompt"][:] == ["seven", "two"]


def test_roles_may_have_different_loras(make_trainer: Make, tmp_path: Path) -> None:
    """Student and critic take their own ranks; the critic follows the student by default."""
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), fake_peft_config=LoraConfig(r=6))
    assert [trainer.roles.lora_config(role).r for role in ("student", "fake")] == [2, 6]
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=3))
    assert trainer.roles.lora_config("fake").r == 3
