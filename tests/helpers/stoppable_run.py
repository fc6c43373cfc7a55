"""The run that tests of stopping kill and go on with: `python stoppable_run.py FOLDER STEPS`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rdm_sdk import RDMConfig, RDMTrainer, digits


def train(folder: Path, steps: int) -> None:
    """Train, or go on from the newest checkpoint in the folder; every step is saved."""
    args = RDMConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        critic_steps=1,
        max_sequence_length=4,
        guidance_scale=1.0,
        num_iterations=2,
        learning_rate=1e-3,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RDMTrainer(digits.teacher_path(), "dm", args, digits.prompts())
    print("ready", flush=True)
    trainer.train(resume_from_checkpoint="latest")
    print("finished", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]))
