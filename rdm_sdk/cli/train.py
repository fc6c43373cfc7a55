"""`rdm-sdk train`: train a student from a YAML file and flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from rdm_sdk.training.config import RDMConfig

HELP = "train a student: --config run.yaml and any setting as a flag; 'train --help' lists them"


def run(arguments: Sequence[str]) -> int:
    """Train, and save the student."""
    from rdm_sdk.cli.run import parse_run
    from rdm_sdk.training.trainer import RDMTrainer
    from rdm_sdk.training.validation import check_writable

    given, _ = parse_run("train", HELP, arguments)
    config = given.config
    if given.prompts is None:
        raise ConfigError("--prompts is missing: give a text file with one prompt per line")
    given.check()
    if given.arguments.save_to is not None:
        check_writable(given.arguments.save_to, "save_to")
    checkpoint = _checkpoint(config)
    student, critic = given.loras
    trainer = RDMTrainer(
        given.model, given.arguments.rewards, config, given.prompts, peft_config=student, fake_peft_config=critic
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(config)) from None
    target = given.arguments.save_to or str(Path(str(config.output_dir)) / "student")
    trainer.save_model(target)
    print(f"wrote the student to {target}")
    return 0


def _checkpoint(config: RDMConfig) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` names; "latest", or true, is the last one in output_dir.

    Raises:
        CheckpointError: there is none.
    """
    from rdm_sdk.training.checkpoint import find

    name = config.resume_from_checkpoint
    if name is None or name.lower() == "false":
        return None
    return find(True if name.lower() in ("latest", "true") else name, str(config.output_dir))


def _how_to_go_on(config: RDMConfig) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(str(config.output_dir))
    latest = get_last_checkpoint(str(output)) if output.is_dir() else None
    if latest is None:
        return "stopped before the first checkpoint, so it starts anew; save_steps says how often one is written"
    return f"stopped; to go on from {latest}, add --resume_from_checkpoint latest to the same command"
