"""Where a run's student starts: at its base, or at a finished student of it (`start_from`)."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file

from rdm_sdk.errors import ConfigError, ModelError, described
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, check_lora_config
from rdm_sdk.training.student_base import PEFT_FOLDER, PEFT_PREFIX, PEFT_WEIGHTS, Weights, check_base, read_base


def starting_lora(folder: str, weights: Weights, given: LoraConfig | None) -> LoraConfig | None:
    """Return the LoRA of a finished student that a run starts from, None where it is a full copy.

    Nothing but two small files is read, so that a wrong folder is found before a base is loaded. `weights` is what of
    the student the run trains, and `given` the LoRA that the user gave.

    Raises:
        ConfigError: the run is to train other weights than the student has, or was given a LoRA beside it.
        ModelError: the folder holds no student.
    """
    place = Path(folder).expanduser()
    kind = read_base(place)["weights"]
    if kind != weights:
        raise ConfigError(
            f"start_from={folder!r} holds a {'LoRA' if kind == 'lora' else 'full copy'}, and student_weights="
            f"{weights!r}; set student_weights={kind!r}"
        )
    if given is not None:
        raise ConfigError(
            f"peft_config and start_from={folder!r} were given, and that student's adapters are as they are; leave out "
            "peft_config (fake_peft_config is free)"
        )
    if kind == "full":
        return None
    try:
        lora: LoraConfig = LoraConfig.from_pretrained(str(place / PEFT_FOLDER), local_files_only=True)
    except Exception as error:  # PEFT raises whatever a damaged file leads to
        raise ModelError(
            f"the settings of the adapters in {folder!r} ({PEFT_FOLDER}/) cannot be read: {described(error)}. Copy the "
            "whole folder that training saved again"
        ) from error
    lora.inference_mode = False
    check_lora_config(lora, f"start_from={folder!r}: its {PEFT_FOLDER}/")
    return lora


def check_start(folder: str, family: ModelFamily) -> None:
    """Raise `ModelError` unless a finished student's base is that of a family without roles yet."""
    place = Path(folder).expanduser()
    check_base(family.pipeline, read_base(place), place, other_base=False)


def load_start(folder: str, family: ModelFamily) -> None:
    """Give the student role of a family the weights of a finished student.

    Raises:
        ModelError: they cannot be read, or do not fit.
    """
    place = Path(folder).expanduser()
    try:
        if STUDENT in family.roles.copies:
            saved = type(family.backbone).from_pretrained(place, subfolder=family.component)
            state = {name: tensor.float() for name, tensor in saved.state_dict().items()}
        else:
            state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(place / PEFT_WEIGHTS).items()}
    except Exception as error:  # diffusers and safetensors raise whatever a damaged file leads to
        raise ModelError(
            f"the student in {folder!r} cannot be loaded: {described(error)}. Copy the whole folder that training "
            "saved again"
        ) from error
    family.roles.load_role_state_dict(STUDENT, state)
