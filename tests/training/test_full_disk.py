"""A disk that is really full: nothing whole is lost, and the run goes on once there is room."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from rdm_sdk import CheckpointError, RDMTrainer
from rdm_sdk.training import checkpoint_folders
from rdm_sdk.training.run_log import parsed, read_log

STEPS = 4
RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "critic_steps": 1,
    "num_iterations": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 24 MB that is all its."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Fills(TrainerCallback):
    """Fills the disk up when the checkpoint of a step is written, but for some bytes."""

    def __init__(self, disk: Path, step: int, left: int) -> None:
        self.ballast, self.step, self.left = disk / "ballast", step, left

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step != self.step:
            return
        with self.ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        with self.ballast.open("ab") as file:
            file.truncate(max(0, self.ballast.stat().st_size - self.left))


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 50_000])
def test_a_full_disk(left: int, disk: Path, tmp_path: Path, make_trainer: Callable[..., RDMTrainer]) -> None:
    """The third checkpoint does not fit; with room, the run goes on, and its end is the uninterrupted one's."""
    whole = make_trainer(tmp_path / "whole", **RUN)
    whole.train()
    fills = Fills(disk, 2, left)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 could not be written .*No space left.* make room"):
        make_trainer(disk / "run", callbacks=[fills], **RUN).train()
    kept = [folder.name for folder in checkpoint_folders.checkpoints_in(disk / "run")]
    assert kept == ["checkpoint-2", "checkpoint-1"]
    assert checkpoint_folders.newest_whole(disk / "run")[1] == []
    assert list((disk / "run").glob(".*")) == []
    fills.ballast.unlink()
    resumed = make_trainer(disk / "run", **RUN)
    resumed.train(resume_from_checkpoint=True)
    ends = [
        load_file(folder / f"checkpoint-{STEPS}" / "rdm_state.safetensors")
        for folder in (tmp_path / "whole", disk / "run")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])
    rows = parsed(read_log(disk / "run" / "log.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


def test_what_is_written_for_people_ends_no_run(
    disk: Path, make_trainer: Callable[..., RDMTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures, and Trainer's state at the end: the steps that were taken are worth more, and what failed is told."""

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    trainer = make_trainer(disk / "run", max_steps=2, log_images=1, logging_strategy="no", callbacks=[Full()])
    with caplog.at_level(logging.WARNING):
        assert trainer.train().global_step == 2
    assert "the pictures of step 1 could not be written: [Errno 28] No space left" in caplog.text
    assert "trainer_state.json could not be written ([Errno 28]" in caplog.text
    assert not list((disk / "run" / "images").glob("*.tmp"))
