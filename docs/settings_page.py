"""Write docs/settings.md from the fields of `RDMConfig`: `python docs/settings_page.py`; `make docs` does."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rdm_sdk import RDMConfig
from rdm_sdk.training.rules import default_of, rules_of

PAGE = Path(__file__).parent / "settings.md"

INTRODUCTION = """# Settings

<!-- Written by docs/settings_page.py from rdm_sdk/training/config.py; change the settings there. -->

Every setting of `RDMConfig` that is the method's own or has another default than in transformers: a keyword in Python,
a key in the YAML of `rdm-sdk train --config`, or a flag such as `--num_generations 8` (but evaluation while training is
for Python alone: the command line has no prompts for it). All others, such as
`output_dir`, `max_steps` and `bf16`, are inherited from transformers'
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments);
but `per_device_train_batch_size` counts samples and must be a multiple of `num_generations`, and those that the method
does not do, such as `fp16` and `deepspeed`, are [refused](trainer.md#settings-of-transformers).

A misspelt name, a choice that does not exist or a value out of range is a `ConfigError`; for the first two it names
what was probably meant.
"""

_HEADING = re.compile(r" {4}# ---- (.+)")
_FIELD = re.compile(r" {4}(\w+): ")


def source() -> str:
    """Return the source of `RDMConfig`, whose comments are the headings."""
    return inspect.getsource(RDMConfig)


def own_settings() -> list[str]:
    """Return the names of the settings that `RDMConfig` declares itself, in the order of its source."""
    return [name for name in RDMConfig.__annotations__ if name in RDMConfig.__dataclass_fields__]


def groups(code: str) -> dict[str, list[str]]:
    """Return the fields that follow each comment "# ---- Heading" in the source of a class."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in code.splitlines():
        if heading := _HEADING.fullmatch(line):
            names = found.setdefault(heading[1], [])
        elif field := _FIELD.match(line):
            names.append(field[1])
    return found


def values(name: str) -> str:
    """Return what a setting may be, such as "`float`: positive, or `None`"."""
    hint = get_type_hints(RDMConfig)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    rule = next((rule for key, rule in rules_of(RDMConfig).items() if name in key.split(", ")), None)
    if get_origin(hint) is Literal:
        text = ", ".join(f"`{choice}`" for choice in get_args(hint))
    else:
        text = " or ".join(f"`{_kind(kind)}`" for kind in kinds if kind is not types.NoneType)
    if rule is not None and (rule.enum or not rule.choices):
        text += f": a value of {rule.enum}" if rule.enum else f": {rule.wanted.removesuffix(', or None')}"
    return text + (", or `None`" if types.NoneType in kinds else "")


def _kind(hint: Any) -> str:
    return str(hint) if get_args(hint) else str(hint.__name__)


def page() -> str:
    """Return the page's text."""
    fields = {field.name: field for field in dataclasses.fields(RDMConfig)}
    parts = [INTRODUCTION]
    for heading, names in groups(source()).items():
        parts += [f"\n## {heading}\n", "\n| setting | values | default | what it does |\n|---|---|---|---|\n"]
        for name in names:
            cells = (f"`{name}`", values(name), f"`{default_of(fields[name])!r}`", fields[name].metadata["help"])
            parts.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(own_settings())} settings")
