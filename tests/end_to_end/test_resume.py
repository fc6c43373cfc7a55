"""Resuming from a checkpoint equals never having stopped, bit for bit (acceptance 4, law 8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rdm_sdk import RDMTrainer

# Ten prompts, two per micro-batch: 5 steps per epoch without accumulation, 3 (12 prompts) with two micro-batches.
STEPS_PER_EPOCH = {1: 5, 2: 3}
# SD3's last block throws its text stream away, so the text queries there get no gradient in any SD3 model.
DEAD = "transformer_blocks.2.attn.add_q_proj"


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Score a picture by its mean, so that the policy route runs beside the pathwise one."""
    return images.mean(dim=(1, 2, 3))


def state_of(trainer: RDMTrainer) -> dict[str, torch.Tensor]:
    """Return every tensor that training has changed: weights, optimizer moments and moving average, by name."""
    tensors = {
        f"{role}.{name}": p.detach().clone()
        for role in trainer.roles.trainable_roles
        for name, p in trainer.roles.parameters_of(role).items()
    }
    moments = trainer.optimizer.state_dict()
    for index, values in moments["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).clone() for key, value in values.items()}
    for group in moments["param_groups"]:
        tensors[f"lr.{group['params'][0]}"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert trainer.ema is not None
    tensors |= {f"ema.{i}": shadow.clone() for i, shadow in enumerate(trainer.ema.shadow_params)}
    tensors["ema.updates"] = torch.tensor(trainer.ema.optimization_step)
    return tensors


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same bits in both."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module", params=[1, 2], ids=["accumulate1", "accumulate2"])
def uninterrupted(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_trainer: Callable[..., RDMTrainer],
) -> tuple[int, Callable[[Path], RDMTrainer], RDMTrainer]:
    """Return the accumulation, a maker of this run's trainers, and the trainer that ran through."""
    accumulation = request.param

    def make(folder: Path) -> RDMTrainer:
        return make_trainer(
            folder,
            ["dm", brightness],
            guidance_scale=1.5,
            gradient_accumulation_steps=accumulation,
            ema_decay=0.9,
            learning_rate=1e-3,
            critic_learning_rate=2e-3,
            lr_scheduler_type="linear",
            max_steps=STEPS_PER_EPOCH[accumulation] + 2,
            save_strategy="steps",
            save_steps=1,
            peft_config=LoraConfig(r=4, lora_alpha=12),
        )

    trainer = make(tmp_path_factory.mktemp(f"whole{accumulation}"))
    trainer.train()
    return accumulation, make, trainer


@pytest.mark.parametrize("where", ["middle", "boundary"])
def test_resumed_run_equals_uninterrupted_run(
    uninterrupted: tuple[int, Callable[[Path], RDMTrainer], RDMTrainer],
    where: str,
    tmp_path: Path,
    losses_of: Callable[[RDMTrainer], list[dict[str, float]]],
) -> None:
    """Weights, both optimizer states, EMA, the next losses and the counted costs are the same bits."""
    accumulation, make, whole = uninterrupted
    at = STEPS_PER_EPOCH[accumulation] if where == "boundary" else STEPS_PER_EPOCH[accumulation] - 1
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{at}")

    assert resumed.state.global_step == whole.state.global_step == STEPS_PER_EPOCH[accumulation] + 2
    assert different(state_of(resumed), state_of(whole)) == []
    assert resumed.costs() == whole.costs()
    expected, got = losses_of(whole), losses_of(resumed)
    assert got == expected  # the history up to the checkpoint comes from it, the rest was computed again
    assert len(got) - at == whole.state.global_step - at >= 2


def test_every_part_that_is_compared_was_moving(
    uninterrupted: tuple[int, Callable[[Path], RDMTrainer], RDMTrainer],
    tmp_path: Path,
    losses_of: Callable[[RDMTrainer], list[dict[str, float]]],
) -> None:
    """The comparison above is worth something: every weight and average had moved, and gradients were not zero."""
    _, make, whole = uninterrupted
    before = {k: p.clone() for r in ("student", "fake") for k, p in make(tmp_path).roles.parameters_of(r).items()}
    after = {k: p for r in ("student", "fake") for k, p in whole.roles.parameters_of(r).items()}
    assert different(before, after) == [name for name in before if DEAD not in name]
    assert whole.ema is not None
    student = whole.roles.parameters_of("student")
    shadow = dict(zip(student, whole.ema.shadow_params, strict=True))
    assert different(shadow, dict(student)) == [name for name in student if DEAD not in name]
    assert all(row["grad_norm"] > 0 and row["dm/critic_grad_norm"] > 0 for row in losses_of(whole))
    assert {"loss/pathwise", "loss/policy"} <= losses_of(whole)[-1].keys()


def test_resume_from_the_latest_checkpoint(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume_from_checkpoint=True` finds the last checkpoint of the output folder and does only what is left."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(tmp_path, max_steps=3)
    ran: list[int] = []
    step = resumed.training_step
    monkeypatch.setattr(resumed, "training_step", lambda *args: (ran.append(1), step(*args))[1])
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.global_step, len(ran)) == (3, 1)
    assert resumed.costs()["cost/critic_steps"] == 6


def test_training_state_in_a_checkpoint_is_raw_not_averaged(
    uninterrupted: tuple[int, Callable[[Path], RDMTrainer], RDMTrainer],
) -> None:
    """The exported LoRA of a checkpoint is the moving average, the training state the raw weights: they differ."""
    _, _, whole = uninterrupted
    folder = sorted(Path(whole.args.output_dir).glob("checkpoint-*"))[-1]
    raw, exported = load_file(folder / "rdm_state.safetensors"), load_file(folder / "peft/adapter_model.safetensors")
    names = [n.removeprefix("student.") for n in raw if n.startswith("student.") and DEAD not in n]
    assert all(not torch.equal(raw[f"student.{n}"], exported[f"base_model.model.{n}"]) for n in names)
