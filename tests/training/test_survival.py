"""Runs that are killed or stopped go on, and end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stoppable_run
from safetensors.torch import load_file

from rdm_sdk.training import checkpoint_folders

STEPS = 12
MANY_STEPS = 60
"""Of a run that is killed more than ten times, however fast the machine is."""


def start(folder: Path, until: str = "ready", steps: int = STEPS) -> subprocess.Popen[str]:
    """Start the run, or go on with it, and return its process when it has printed a line that begins like this."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, stoppable_run.__file__, str(folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.stderr.read() if process.stderr else "")


def same_end(one: Path, other: Path, steps: int = STEPS) -> bool:
    """Return whether two runs have ended with the same bits: weights, averages and Trainer's history."""
    first, second = (folder / f"checkpoint-{steps}" for folder in (one, other))
    a, b = (load_file(folder / "rdm_state.safetensors") for folder in (first, second))
    equal = a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)
    files = ("optimizer.pt", "critic_optimizer.pt", "scheduler.pt")
    return equal and all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    stoppable_run.train(folder, STEPS)
    return folder


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_stopped_run_saves_and_goes_on(uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It ends between two steps with a whole checkpoint and a line that says how to go on; the end is the same."""
    process = start(tmp_path, "step ")
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), errors
    newest, skipped = checkpoint_folders.newest_whole(tmp_path)
    assert newest is not None
    assert skipped == []
    assert f"stopped by {number.name} after optimizer step {checkpoint_folders.step_of(newest)}" in errors
    assert "--resume_from_checkpoint latest" in errors
    stoppable_run.train(tmp_path, STEPS)
    assert same_end(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_twenty_kills(tmp_path: Path, number: signal.Signals) -> None:
    """At random moments, writing checkpoints included: every time it goes on, and the end is the same bits.

    A moment is some of the run's lines after it is ready, and some time after the last of them.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    moments = random.Random(0)
    stopped = 0
    while stopped < 20 and not (killed / f"checkpoint-{MANY_STEPS}").exists():
        process = start(killed, steps=MANY_STEPS)
        assert process.stdout is not None
        for _ in range(moments.randrange(4)):
            process.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.15))
        process.send_signal(number)
        process.communicate(timeout=100)
        stopped += 1
        assert checkpoint_folders.newest_whole(killed)[1] == []
    for folder in (whole, killed):
        stoppable_run.train(folder, MANY_STEPS)
    assert same_end(whole, killed, MANY_STEPS)
    assert stopped >= 10
