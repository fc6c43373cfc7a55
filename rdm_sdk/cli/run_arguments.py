"""The settings of a run from YAML and flags, the same for every command that takes a run (`train`, `plan`)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from peft import LoraConfig
from trl.scripts.utils import TrlParser

from rdm_sdk import digits
from rdm_sdk.cli.console import Parser, one_line
from rdm_sdk.errors import ConfigError, RDMError, nearest
from rdm_sdk.families.load import find_folder
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import load_prompts
from rdm_sdk.training.rules import check_known


@dataclass
class RunArguments:
    """What a run needs beside the settings of `RDMConfig`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Base model: a hub id, a local path, or 'digits' for the embedded teacher. Required."},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "A file of prompts: text, CSV, JSON or Parquet; not needed for 'digits'."}
    )
    rewards: str = field(default="dm", metadata={"help": "Reward spec, such as 'dm + 0.5*legibility'."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank of the student and the critic."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha of the student and the critic."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get adapters; the family's usual ones by default."}
    )
    save_to: str | None = field(default=None, metadata={"help": "Folder for the student; output_dir/student if unset."})

    def __post_init__(self) -> None:
        if self.model is None:
            raise ConfigError("--model is missing: give a hub id, the path of a pipeline's folder, or 'digits'")
        if self.save_to is not None:  # shells leave "~" alone in a file, and behind an equals sign
            self.save_to = str(Path(self.save_to).expanduser())
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """A run as the command line describes it: what `RDMTrainer` takes."""

    arguments: RunArguments
    config: RDMConfig

    @property
    def model(self) -> str:
        return base_path(str(self.arguments.model))

    @property
    def prompts(self) -> str | list[str] | None:
        """The prompts' file; those of the digits, where none is given for them."""
        return self.arguments.prompts or (digits.prompts() if self.arguments.model == "digits" else None)

    @property
    def loras(self) -> tuple[LoraConfig | None, LoraConfig | None]:
        """The LoRA of the student and that of the critics, None for what is trained in full or as `start_from` is."""
        given = self.arguments
        lora = LoraConfig(r=given.lora_r, lora_alpha=given.lora_alpha, target_modules=given.lora_target_modules)
        student, critic = (kind == "full" for kind in (self.config.student_weights, self.config.critic_weights))
        if self.config.start_from is not None and not student:
            return None, None  # the critics take after the student
        return None if student else lora, None if critic else lora

    def check(self) -> None:
        """Raise for what can be seen to be wrong without loading anything.

        Raises:
            ConfigError: the settings ask for what the command line cannot give.
            DataError: the prompts cannot be used.
            ModelError: there is no such folder, or no pipeline in it.
        """
        full = self.loras == (None, None)
        for spec in fields(RunArguments) if full else ():
            if spec.name.startswith("lora_") and getattr(self.arguments, spec.name) != spec.default:
                raise ConfigError(
                    f"--{spec.name} describes adapters, and student_weights='full' with critic_weights='full' has none"
                    if self.config.start_from is None
                    else f"--{spec.name} describes adapters, and start_from={self.config.start_from!r} has its own"
                )
        if str(getattr(self.config.eval_strategy, "value", self.config.eval_strategy)) != "no":
            raise ConfigError(
                "eval_strategy needs prompts to evaluate with, which the command line does not take; leave it out, or "
                "use RDMTrainer(eval_dataset=...) in Python"
            )
        if self.prompts is not None:
            load_prompts(self.prompts, "--prompts")
        find_folder(self.model)


def base_path(model: str) -> str:
    """Return what a base is loaded from: `digits` is the embedded teacher."""
    return digits.teacher_path() if model == "digits" else model


def parse_run(
    command: str,
    description: str,
    arguments: Sequence[str],
    more: Iterable[type] = (),
    fixed: Mapping[str, object] | None = None,
) -> tuple[Run, list[Any]]:
    """Return the run that flags and a YAML file (`--config`) describe; flags win.

    Args:
        command: as it is typed, such as "train".
        description: for its `--help`.
        arguments: the words after the command.
        more: dataclasses of further flags, which come back in order.
        fixed: settings that are the command's to set, whatever the user does.

    Raises:
        ConfigError: a name or a value cannot be used, or the file cannot be read.
        SystemExit: the help was asked for and printed.
    """
    kinds: list[Any] = [RunArguments, *more, RDMConfig]
    parser = _RunParser(dataclass_types=kinds, prog=f"rdm-sdk {command}", description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win")
    finder = Parser(prog=parser.prog, add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    if path is not None:
        parser.set_defaults(**parser.converted(_read_yaml(path)))
    given, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("--"):
            check_known([word[2:].split("=")[0]], [*vars(given)])
        parser.error(f"unrecognized words: {' '.join(rest)}")
    values = vars(given) | dict(fixed or {})
    run, *others, config = (_made(kind, values) for kind in kinds)
    return Run(run, config), others


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of its share of the values."""
    try:
        return kind(**{spec.name: values[spec.name] for spec in fields(kind) if spec.init})
    except RDMError:
        raise
    except Exception as error:  # transformers checks its settings in many ways
        raise ConfigError(one_line(error)) from error


class _RunParser(Parser, TrlParser):
    """TRL's parser of flags and YAML, with values of YAML checked as those of flags are."""

    def converted(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings of a YAML file as their flags would have them.

        Raises:
            ConfigError: an unknown name, or a value that its flag would not take.
        """
        names = [spec.name for kind in self.dataclass_types for spec in fields(kind) if spec.init]
        check_known([str(key) for key in content], names)
        actions = {action.dest: action for action in reversed(self._actions)}
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        return {name: _converted(actions[name], value, str(hints[name])) for name, value in content.items()}


def _converted(action: argparse.Action, value: Any, hint: str) -> Any:
    """Return a value of YAML as the flag of an action would have it; `hint` is the setting's type."""
    if value is None and (action.default is None or "None" in hint):
        return None
    if isinstance(value, dict) and "dict[" in hint and action.type is not str:
        return value  # where the type is str, the flag reads JSON, and so does the setting
    if isinstance(value, list) and "list[" in hint:
        return [_one(action, part) for part in value]
    return [_one(action, value)] if action.nargs == "+" else _one(action, value)


_WANTED = {"int": "a whole number", "float": "a number", "str": "a text", "string_to_bool": "true or false"}
"""What a flag takes, by the name of the function that reads it."""


def _one(action: argparse.Action, value: Any) -> Any:
    """Return a single value of YAML as the flag of an action would have it."""
    kind: Any = action.type
    choices: Any = action.choices
    if isinstance(value, bool) and choices:  # YAML reads a bare `no` or `off` as false
        value = next((word for word in (("yes", "on") if value else ("no", "off")) if word in choices), value)
    try:
        made = kind(json.dumps(value) if isinstance(value, (bool, dict)) else str(value))
        fits = value is not None and not isinstance(value, list) and (choices is None or made in choices)
    except Exception:  # the types of some flags are classes of other libraries, which raise what they like
        fits = False
    if not fits:
        wanted = (
            f"one of {', '.join(map(str, choices))}"
            if choices
            else _WANTED.get(getattr(kind, "__name__", ""), "what its flag takes")
        )
        meant = nearest(str(value), map(str, choices or ()))
        raise ConfigError(f"{action.dest}={value!r} cannot be used; it must be {wanted}{meant and '.' + meant}")
    return made


class _Loader(yaml.SafeLoader):
    """Refuses what is there more than once, of which YAML's other readers take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is there more than once", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    """Return a YAML file's settings; those of `env` go into the environment, as in TRL."""
    if not Path(path).is_file():
        raise ConfigError(f"--config: there is no file {path!r}")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is no text in UTF-8: {one_line(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must map settings to values")
    environment = content.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ConfigError(f"--config: env in {path} must map names of environment variables to values")
    for name, value in environment.items():
        try:
            os.environ[str(name)] = str(value)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"--config: env in {path} has {name!r}: {value!r}, which the system does not take for an environment "
                f"variable: {one_line(error)}"
            ) from error
    return content
