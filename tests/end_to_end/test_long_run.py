"""A long run keeps its size: memory, tensors, objects, threads and open files are after 2,000 steps what they were."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerCallback, TrainerState

from rdm_sdk import RDMTrainer

EARLY, LATE = 500, 2000


class Sizes(TrainerCallback):
    """Takes down what the process holds, at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.found: dict[int, dict[str, int]] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            objects, process = gc.get_objects(), psutil.Process()
            self.found[state.global_step] = {
                "bytes": process.memory_info().rss,
                "tensors": sum(isinstance(one, torch.Tensor) for one in objects),
                "objects": len(objects),
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_grows(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """With a critic, rewards by gradient and by advantage, rollouts used twice, logs, pictures and checkpoints."""
    sizes = Sizes(EARLY, LATE)
    trainer = make_trainer(
        tmp_path,
        "dm + 0.1*legibility + 0.1*jpeg",
        callbacks=[sizes],
        max_steps=LATE,
        per_device_train_batch_size=2,
        num_generations=2,
        num_inference_steps=2,
        critic_steps=1,
        num_iterations=2,
        ema_decay=0.9,
        learning_rate=1e-5,
        logging_steps=5,
        log_images=250,
        log_images_limit=4,
        save_strategy="steps",
        save_steps=250,
        save_total_limit=2,
    )
    trainer.train()
    early, late = sizes.found[EARLY], sizes.found[LATE]
    grown = {name: late[name] - early[name] for name in early}
    assert grown["bytes"] < 16e6
    assert grown["tensors"] <= 0
    assert grown["objects"] < 0.002 * early["objects"]
    assert grown["files"] <= 0
    assert grown["threads"] <= 0
    assert len(list((tmp_path / "images").iterdir())) <= 4
    assert (tmp_path / f"checkpoint-{LATE}" / "trainer_state.json").stat().st_size < 200_000
