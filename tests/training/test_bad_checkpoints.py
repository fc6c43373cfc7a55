"""Damaged and foreign checkpoints: a clear error before any training starts (acceptance 7)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sealing import seal
from torch import Tensor

from rdm_sdk import (
    Capabilities,
    CheckpointError,
    ModelError,
    RDMTrainer,
    Reward,
    RewardBatch,
    RewardConfig,
    digits,
)
from rdm_sdk.training import checkpoint

Make = Callable[..., RDMTrainer]


@pytest.fixture(scope="module")
def whole_checkpoint(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good checkpoint of a "dm" run with default LoRA and a moving average."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1, ema_decay=0.9).train()
    return folder / "checkpoint-1"


@pytest.fixture
def damaged(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "checkpoint-1"))


def resume(make_trainer: Make, tmp_path: Path, checkpoint: Path, rewards: str = "dm", **settings: Any) -> None:
    """Resume a run like the one that made the checkpoint."""
    trainer = make_trainer(tmp_path / "run", rewards, **({"ema_decay": 0.9} | settings))
    trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_a_reward_with_other_defaults_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """As after an upgrade of its package: no spec names them, and yet the reward is another."""

    class Power(Reward):
        capabilities = Capabilities()

        class Config(RewardConfig):
            power: int = 2

        def score(self, batch: RewardBatch) -> Tensor:
            return batch.images.pow(self.config.power).mean((1, 2, 3))

    class Later(Power):
        name = "power"

        class Config(RewardConfig):
            power: int = 2
            crop: int = 0

    class Changed(Power):
        name = "power"

        class Config(RewardConfig):
            power: int = 4

    def make(reward: Reward) -> RDMTrainer:
        return make_trainer(tmp_path / "run", ["dm", reward], max_steps=2, save_strategy="steps", save_steps=1)

    make(Power()).train()
    first = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"'power' .* had power=2; here it has 4"):
        make(Changed()).train(resume_from_checkpoint=first)
    make(Later()).train(resume_from_checkpoint=first)  # an option more, and what was there is as it was


FILES = ["rdm_state.safetensors", "rdm_state.json", "trainer_state.json", "optimizer.pt", "scheduler.pt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_with_a_missing_file_is_refused(
    make_trainer: Make, tmp_path: Path, damaged: Path, name: str
) -> None:
    """An interrupted save is recognized, and the missing file is named."""
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98], ids=["empty", "half", "almost"])
@pytest.mark.usefixtures("no_training")
def test_a_truncated_checkpoint_is_refused(
    make_trainer: Make, tmp_path: Path, damaged: Path, name: str, keep: float
) -> None:
    """A file that was cut off is recognized before anything is loaded."""
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} changed"):
        resume(make_trainer, tmp_path, damaged)
    seal(damaged)  # and where no manifest tells it
    with pytest.raises(CheckpointError, match="damaged"):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.usefixtures("no_training")
def test_too_little_memory_is_no_damage(
    make_trainer: Make, tmp_path: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole checkpoint must not be thrown away for the machine that could not read it."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoint, "_read", fail)
    with pytest.raises(MemoryError, match="no room"):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.parametrize("change", ["unknown", "lacking", "list", "text"])
@pytest.mark.usefixtures("no_training")
def test_broken_run_state_is_refused(make_trainer: Make, tmp_path: Path, damaged: Path, change: str) -> None:
    """JSON that is valid but not a run state is recognized."""
    state = json.loads((damaged / "rdm_state.json").read_text())
    lacking = {name: value for name, value in state.items() if name != "rewards"}
    content = {"unknown": state | {"surprise": 1}, "lacking": lacking, "list": [state], "text": "state"}[change]
    (damaged / "rdm_state.json").write_text(json.dumps(content))
    seal(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.parametrize("lost", ["student.", "fake.", "ema.1"])
@pytest.mark.usefixtures("no_training")
def test_missing_weights_in_a_checkpoint_are_refused(
    make_trainer: Make, tmp_path: Path, damaged: Path, lost: str
) -> None:
    """A weight file that lacks tensors of a role or of the moving average is not half loaded."""
    tensors = load_file(damaged / "rdm_state.safetensors")
    gone = next(name for name in tensors if name.startswith(lost))
    save_file({n: t for n, t in tensors.items() if n != gone}, damaged / "rdm_state.safetensors")
    seal(damaged)
    with pytest.raises((CheckpointError, ModelError)):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"base": "0" * 16}, "another base model"), ({"rewards": ["hps"]}, "hps"), ({"format": 99}, "format 99")],
)
@pytest.mark.usefixtures("no_training")
def test_a_foreign_checkpoint_is_refused(
    make_trainer: Make, tmp_path: Path, damaged: Path, change: dict[str, Any], words: str
) -> None:
    """A checkpoint of another base, of other rewards or of a later format is told apart."""
    state = json.loads((damaged / "rdm_state.json").read_text())
    (state["identity"] if "base" in change else state).update(change)
    (damaged / "rdm_state.json").write_text(json.dumps(state))
    seal(damaged)
    with pytest.raises(CheckpointError, match=words):
        resume(make_trainer, tmp_path, damaged)


@pytest.mark.usefixtures("no_training")
def test_resuming_on_another_base_is_refused(make_trainer: Make, tmp_path: Path, whole_checkpoint: Path) -> None:
    """The fingerprint tells a base whose weights differ."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    for parameter in pipeline.transformer.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(CheckpointError, match="another base model"):
        resume(make_trainer, tmp_path, whole_checkpoint, model=pipeline)


@pytest.mark.usefixtures("no_training")
def test_resuming_with_other_rewards_is_refused(make_trainer: Make, tmp_path: Path, whole_checkpoint: Path) -> None:
    """The message names both sets of rewards."""
    with pytest.raises(CheckpointError, match=r"\['dm'\].*\['dm', 'legibility'\]"):
        resume(make_trainer, tmp_path, whole_checkpoint, "dm + legibility")


@pytest.mark.usefixtures("no_training")
def test_resuming_without_the_moving_average_is_refused(
    make_trainer: Make, tmp_path: Path, whole_checkpoint: Path
) -> None:
    """The message says which setting to change."""
    with pytest.raises(CheckpointError, match="set ema_decay above 0"):
        resume(make_trainer, tmp_path, whole_checkpoint, ema_decay=0.0)


@pytest.mark.usefixtures("no_training")
def test_resuming_with_another_rank_is_refused(make_trainer: Make, tmp_path: Path, whole_checkpoint: Path) -> None:
    """Weights of another shape are refused, and the rank is named as the likely cause."""
    with pytest.raises((CheckpointError, ModelError), match=r"do not fit.*another LoRA rank"):
        resume(make_trainer, tmp_path, whole_checkpoint, peft_config=LoraConfig(r=8))


@pytest.mark.usefixtures("no_training")
def test_resuming_with_other_targets_is_refused(make_trainer: Make, tmp_path: Path, whole_checkpoint: Path) -> None:
    """Weights for other layers are refused, and the targets are named as the likely cause."""
    with pytest.raises((CheckpointError, ModelError), match=r"do not fit.*LoRA targets"):
        resume(
            make_trainer,
            tmp_path,
            whole_checkpoint,
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=["attn.to_q"]),
        )


@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_that_is_none_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A missing folder, and an empty one."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no folder"):
        resume(make_trainer, tmp_path, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no rdm_manifest\.json.*no checkpoint of this SDK"):
        resume(make_trainer, tmp_path, tmp_path / "empty")
