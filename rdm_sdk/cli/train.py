"""`rdm-sdk train`: train a student from a YAML file and flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_sdk.cli.console import PROMPTS_MISSING
from rdm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from rdm_sdk.training.config import RDMConfig

HELP = "train a student: --config run.yaml and any setting as a flag; 'train --help' lists them"


def run(arguments: Sequence[str]) -> int:
    """Train, and save the student."""
    from rdm_sdk.cli.run_arguments import parse_run
    from rdm_sdk.training.export import check_target
    from rdm_sdk.training.trainer import RDMTrainer
    from rdm_sdk.training.validation import check_writable

    given, _ = parse_run("train", HELP, arguments)
    config = given.config
    if given.prompts is None:
        raise ConfigError(PROMPTS_MISSING)
    given.check()
    check_target(given.arguments.save_to or str(Path(str(config.output_dir)) / "student"))
    if given.arguments.save_to is not None:
        check_writable(given.arguments.save_to, "save_to")
    _check_checkpoint(config)
    student, critic = given.loras
    trainer = RDMTrainer(
        given.model, given.arguments.rewards, config, given.prompts, peft_config=student, fake_peft_config=critic
    )
    try:
        trainer.train()
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(str(stopped) or _how_to_go_on(config)) from None
    target = given.arguments.save_to or str(trainer.keeper.records / "student")
    trainer.save_model(target)
    print(f"wrote the student to {target}")
    return 0


def _check_checkpoint(config: RDMConfig) -> None:
    """Raise `CheckpointError` if `resume_from_checkpoint` names a folder that is no checkpoint."""
    from rdm_sdk.training.checkpoint import chosen
    from rdm_sdk.training.checkpoint_folders import read_manifest

    folder = chosen(config.resume_from_checkpoint)
    if not isinstance(folder, bool):
        read_manifest(Path(folder).expanduser())


def _how_to_go_on(config: RDMConfig) -> str:
    from rdm_sdk.training.checkpoint_folders import newest_first

    found = newest_first(Path(str(config.output_dir)))
    if not found:
        return "stopped before the first checkpoint, so it starts anew; save_steps says how often one is written"
    return f"stopped; to go on from {found[0]}, add --resume_from_checkpoint latest to the same command"
