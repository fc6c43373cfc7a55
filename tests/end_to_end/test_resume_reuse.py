"""Law 8 with the rollout buffer: stopped in the middle of a rollout's uses or at their end, a run goes on as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from digit_runs import brightness, pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sealing import seal
from torch import Tensor

from rdm_sdk import CheckpointError, RDMTrainer

Make = Callable[..., RDMTrainer]
ROLLOUTS = "rdm_rollouts_0.safetensors"


def state_of(trainer: RDMTrainer) -> dict[str, Tensor]:
    """Return every tensor that training has changed: weights of all roles, optimizer moments and moving average."""
    tensors = {
        f"{role}.{i}": p for role in trainer.roles.trainable_roles for i, p in enumerate(trainer.parameters_of(role))
    }
    for index, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    assert trainer.ema is not None
    return tensors | {f"ema.{i}": shadow for i, shadow in enumerate(trainer.ema.shadow_params)}


class Case(NamedTuple):
    """A kind of run: its settings, and after which steps it is stopped."""

    settings: dict[str, Any]
    stops: tuple[int, int]
    stored: tuple[bool, bool]
    """Whether rollouts are left over for the next step there."""


CASES = {
    "balance": Case({"weighting": "balance[decay=0.5]"}, (2, 3), (True, False)),
    "constraint,accumulate2": Case(
        {"weighting": "constraint[decay=0.5,rate=0.3]", "gradient_accumulation_steps": 2}, (1, 3), (True, False)
    ),
    "two uses": Case({"num_iterations": 2, "sampler": "cps", "eta": 0.7}, (1, 3), (True, True)),
}


class Run(NamedTuple):
    """A run that went through, and how to make another like it."""

    case: Case
    make: Callable[[Path], RDMTrainer]
    whole: RDMTrainer


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_trainer: Make) -> Run:
    """Return a run of five steps with every kind of state there is."""
    case: Case = request.param

    def make(folder: Path) -> RDMTrainer:
        settings = {"num_iterations": 3, "ema_decay": 0.9, "max_steps": 5, "min_effective_sample_size": 0.0}
        settings |= {"learning_rate": 3e-3, "critic_learning_rate": 2e-3, "critic_steps": 1, "guidance_scale": 1.5}
        settings |= {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 1}
        rewards = ["dm + 0.3*legibility + 0.2*adversarial + 0.1*guidance", (brightness, 0.2)]
        return make_trainer(folder, rewards, pictures(), **(settings | case.settings))

    whole = make(tmp_path_factory.mktemp("whole"))
    whole.train()
    return Run(case, make, whole)


def checkpoint_of(run: Run, step: int) -> Path:
    """Return the folder of a checkpoint of the whole run."""
    return Path(run.whole.args.output_dir) / f"checkpoint-{step}"


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_resumed_equals_uninterrupted(
    run: Run, which: int, tmp_path: Path, losses_of: Callable[[RDMTrainer], list[dict[str, float]]]
) -> None:
    """Weights of all roles, optimizer, EMA, the strategy's state, costs and every logged figure: the same bits."""
    at = run.case.stops[which]
    assert (checkpoint_of(run, at) / ROLLOUTS).is_file() == run.case.stored[which]
    resumed = run.make(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint_of(run, at)))
    expected, got = state_of(run.whole), state_of(resumed)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert any(name.startswith("discriminator.") for name in expected)
    assert resumed.weights == run.whole.weights
    assert resumed.weighting.state_dict() == run.whole.weighting.state_dict()
    assert resumed.costs() == run.whole.costs()
    assert losses_of(resumed) == losses_of(run.whole)


def test_what_is_compared_was_moving(run: Run, losses_of: Callable[[RDMTrainer], list[dict[str, float]]]) -> None:
    """The comparison is worth something: ratios were not 1, weights changed, and rollouts were used again."""
    rows = losses_of(run.whole)
    ess = [row["ratio/ess"] for row in rows if "ratio/ess" in row]
    assert 2 <= len(ess) < 5
    assert all(0 < share < 1 - 1e-6 for share in ess)
    assert all(row["ratio/stopped"] == 0.0 for row in rows if "ratio/ess" in row)
    assert all("loss/pathwise" in row and row["adversarial/critic_loss"] > 0 for row in rows)
    assert all("loss/policy" in row for row in rows[1:])  # in the first step `balance` knows no pull yet
    if run.case.settings.get("weighting"):
        assert run.whole.weighting.state_dict()
        assert len({row["weights/legibility"] for row in rows}) > 2


def test_the_stored_rollouts_are_whole(run: Run) -> None:
    """What the file holds is finite, and goes with as many samples as were rolled out."""
    file = checkpoint_of(run, 1) / ROLLOUTS
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    batches = run.case.settings.get("gradient_accumulation_steps", 1)
    prompts = json.loads(metadata["prompts"])
    assert [len(texts) for texts in prompts] == [8] * batches
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert sum(name.endswith(".scored.brightness") for name in tensors) == batches


# ---- Damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reused(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint in the middle of a rollout's uses."""
    folder = tmp_path_factory.mktemp("reused")
    make_trainer(folder, num_iterations=3, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def unlabeled(file: Path) -> None:
    save_file(load_file(file), file, {"format": "pt"})


def lacking(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({name: t for name, t in tensors.items() if not name.endswith("rollout.states")}, file, metadata)


@pytest.mark.parametrize("damage", [Path.unlink, emptied, halved, foreign, unlabeled, lacking])
def test_rollouts_that_are_missing_or_damaged_are_refused(
    make_trainer: Make, tmp_path: Path, reused: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is a CheckpointError that names the checkpoint, before any step is taken."""
    folder = Path(shutil.copytree(reused, tmp_path / "checkpoint-1"))
    damage(folder / ROLLOUTS)
    trainer = make_trainer(tmp_path / "run", num_iterations=3)
    monkeypatch.setattr(trainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(CheckpointError, match=r"checkpoint-1'.*(changed|missing)"):
        trainer.train(resume_from_checkpoint=str(folder))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"checkpoint-1'.*(damaged|missing)"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_more_uses_than_were_planned(make_trainer: Make, tmp_path: Path, reused: Path) -> None:
    """Resuming with a larger `num_iterations` is either refused or goes on; it does not break in the middle."""
    trainer = make_trainer(tmp_path, num_iterations=6, max_steps=6)
    try:
        trainer.train(resume_from_checkpoint=str(reused))
    except CheckpointError as error:
        assert "num_iterations" in str(error)  # noqa: PT017 - both ends are good
    else:
        assert trainer.state.global_step == 6


def test_fewer_uses_than_were_planned(make_trainer: Make, tmp_path: Path, reused: Path) -> None:
    """Resuming without reuse goes on with fresh rollouts, or is refused."""
    trainer = make_trainer(tmp_path, num_iterations=1, max_steps=3)
    try:
        trainer.train(resume_from_checkpoint=str(reused))
    except CheckpointError as error:
        assert "num_iterations" in str(error)  # noqa: PT017 - both ends are good
    else:
        assert trainer.costs()["cost/rollouts"] == 3 * 8
