"""What the examples share, so that each shows its own matter alone: flags, and settings for the embedded digits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rdm_sdk import RDMConfig


def flags(description: str | None, steps: int) -> argparse.ArgumentParser:
    """Return a parser with `--output`, `--steps` (by default the number given here) and `--batch`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="where runs and students go")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, default=64, help="samples in a step, a multiple of 8")
    return parser


def digits_settings(options: argparse.Namespace, run: str, **settings: Any) -> RDMConfig:
    """Return what suits the embedded digits teacher; `settings` are what an example is about.

    Args:
        options: parsed `flags`.
        run: the name of the run's folder in `--output`.
        settings: win over those in here.
    """
    usual: dict[str, Any] = {
        "output_dir": str(options.output / run),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "num_generations": 8,
        "learning_rate": 1e-3,
        "guidance_scale": 1.0,  # the digits' teacher was trained without guidance
        "max_sequence_length": 4,  # and needs no more text tokens
        "save_strategy": "no",
    }
    return RDMConfig(**(usual | settings))
