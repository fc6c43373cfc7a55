"""The student on the Hugging Face Hub: what `save_model` writes, pushed as a whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.trainer_utils import HubStrategy

from rdm_sdk.errors import ConfigError
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.export import CALL, SCHEDULER
from rdm_sdk.training.student_base import BASE, PEFT_FOLDER, WEIGHTS

logger = logging.getLogger(__name__)


def make_repository(args: RDMConfig, token: str | None = None, private: bool | None = None) -> str:
    """Make the repository that the settings name, if there is none, and return its full name.

    Raises:
        ConfigError: the Hub does not let us.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    try:
        url = huggingface_hub.HfApi(token=token or args.hub_token).create_repo(
            name, private=args.hub_private_repo if private is None else private, exist_ok=True
        )
    except Exception as error:  # whatever of network, login or rights
        raise ConfigError(
            f"push_to_hub: the repository {name!r} cannot be made or reached: {' '.join(str(error).split())}. Log in "
            "with 'hf auth login' or set hub_token; hub_model_id names the repository"
        ) from error
    return str(url.repo_id)


def push(
    args: RDMConfig,
    repository: str | None,
    component: str,
    message: str,
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    *,
    folder: Path | None = None,
    **card: Any,
) -> Any:
    """Upload the export in a folder, and nothing else that is there; returns the commit, or its future.

    Weights of another kind of student, which somebody may have put there, are left out: they would be loaded for it.

    Processes that do not push have no repository (None). `component` names the folder of a full copy's weights; `token`
    and `revision` take the place of the settings'; `folder` is `args.output_dir` by default; `card` is what Trainer
    would put into another card.

    Raises:
        ConfigError: something is to be put into a card.
    """
    if card:
        raise ConfigError(f"push_to_hub() takes no {', '.join(card)}: the model card is the one that save_model writes")
    if repository is None:
        return None
    api: Any = huggingface_hub.HfApi(token=token or args.hub_token)
    weights = [f"{component}/*"] if args.student_weights == "full" else [WEIGHTS, f"{PEFT_FOLDER}/*"]
    return api.upload_folder(
        repo_id=repository,
        folder_path=str(args.output_dir if folder is None else folder),
        commit_message=message,
        revision=revision or args.hub_revision,
        allow_patterns=["README.md", CALL, BASE, SCHEDULER, *weights],
        run_as_future=not blocking,
    )


def push_checkpoint(args: RDMConfig, repository: str | None, component: str, output_dir: Path, step: int) -> None:
    """Upload what `hub_strategy` says of a checkpoint: nothing, its export, or all of it as well.

    What fails is logged, and the run goes on: the checkpoint is on the disk, and the end of the run pushes again.
    """
    strategy = HubStrategy(args.hub_strategy)
    if not args.push_to_hub or repository is None or strategy == HubStrategy.END:
        return
    folder = output_dir / f"checkpoint-{step}"
    message = f"Training in progress, {folder.name}"
    try:
        push(args, repository, component, message, folder=folder)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            huggingface_hub.HfApi(token=args.hub_token).upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                path_in_repo="last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name,
                commit_message=f"{message}, checkpoint",
                revision=args.hub_revision,
                # Of one checkpoint after another in one place, what only the earlier had would stay.
                delete_patterns="*" if strategy == HubStrategy.CHECKPOINT else None,
            )
    except Exception as error:
        logger.error(f"{folder.name} could not be pushed to {repository!r}: {error}; training goes on")
