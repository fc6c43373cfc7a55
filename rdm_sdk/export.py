"""What a trained student leaves behind: files that plain diffusers and PEFT load."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from rdm_sdk.errors import ModelError
from rdm_sdk.models.base import ModelAdapter
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.rewards.spec import show_spec

STUDENT = "student"
PEFT_FOLDER = "peft"


@dataclass(frozen=True)
class StudentInfo:
    """What the export says about a student beside its weights."""

    num_steps: int
    shift: float | None
    stochastic: bool
    """Whether its sampler re-noises."""
    guidance_scale: float
    """Of the training run."""
    rewards: Sequence[WeightedReward]
    settings: Mapping[str, object]
    """The settings that differ from the defaults, for the model card."""


def save_student(directory: str | Path, adapter: ModelAdapter, info: StudentInfo) -> None:
    """Write the student role's current weights, its scheduler and a model card into a folder.

    Files: `pytorch_lora_weights.safetensors` (diffusers, with LoRA metadata: without it, an alpha other than the rank
    would load wrongly and silently), `peft/`, `scheduler/` and `README.md`. Everything is written beside the folder
    first and then moved in file by file, so that an earlier export is never left half overwritten.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as scratch:
        staged = Path(scratch)
        state = adapter.roles.role_state_dict(STUDENT)
        config = adapter.roles.lora_config(STUDENT)
        adapter.save_lora(staged, state, config.to_dict())
        (staged / PEFT_FOLDER).mkdir()
        save_file(
            {f"base_model.model.{name}": tensor for name, tensor in state.items()},
            staged / PEFT_FOLDER / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(staged / PEFT_FOLDER))
        adapter.student_scheduler(info.num_steps, info.shift, info.stochastic).save_pretrained(staged / "scheduler")
        (staged / "README.md").write_text(model_card(adapter, info), encoding="utf-8")
        move_into(staged, target)


def load_student(pipeline: Any, directory: str | Path) -> None:
    """Load a trained student's weights into a plain pipeline of its base, with nothing but diffusers and PEFT.

    Raises:
        ModelError: the folder holds no student.
    """
    weights = Path(directory) / "pytorch_lora_weights.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"there is no student in {str(directory)!r} (no {weights.name}); give the folder that training saved"
        )
    pipeline.load_lora_weights(str(directory))


def move_into(staged: Path, target: Path) -> None:
    """Move every file below `staged` to the same place below `target`, replacing each as a whole."""
    for source in sorted(path for path in staged.rglob("*") if path.is_file()):
        destination = target / source.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Files of a temporary folder are private to their owner; an export is to be shared like any other file.
        shutil.copymode(target, source)
        source.chmod(source.stat().st_mode & 0o666)
        source.replace(destination)


def model_card(adapter: ModelAdapter, info: StudentInfo) -> str:
    """Return the model card: base, method, rewards, settings, and the code that samples the student."""
    rewards = show_spec([own.term for own in info.rewards])
    origins = ", ".join(dict.fromkeys(str(own.reward.provenance()["origin"]) for own in info.rewards))
    pipeline = type(adapter.pipeline).__name__
    scheduler = type(adapter.pipeline.scheduler).__name__
    data = ModelCardData(
        base_model=adapter.base_name if not Path(adapter.base_name).exists() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["rdm-sdk", "lora", "distillation", "few-step", "diffusers"],
    )
    grid = ", ".join(f"{sigma:g}" for sigma in adapter.student_sigmas(info.num_steps, info.shift))
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in info.settings.items())
    noising = "noises it again" if info.stochastic else "moves straight on to the next level"
    lora = adapter.roles.lora_config(STUDENT)
    arguments = adapter.inference_call(info.num_steps, info.guidance_scale)
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    text = f"""
# A {info.num_steps}-step student of {adapter.base_name}

A LoRA (rank {lora.r}, alpha {lora.lora_alpha}) that samples `{adapter.base_name}` in {info.num_steps} steps without
guidance, distilled with [rdm-sdk](https://pypi.org/project/rdm-sdk/) by distribution matching as a reward
([arXiv 2603.28460](https://arxiv.org/abs/2603.28460)).

```python
from diffusers import {pipeline}, {scheduler}

folder = "path/to/this/folder"
pipe = {pipeline}.from_pretrained("{adapter.base_name}")
pipe.load_lora_weights(folder)
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
image = pipe("{{your prompt}}", {call}).images[0]
```

- Rewards: `{rewards}` (from {origins})
- Noise levels of the steps: {grid} (in `scheduler/`; each step predicts the image and {noising})
- The same weights in PEFT's format: `{PEFT_FOLDER}/`

| setting | value |
|---|---|
{settings}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def non_default_settings(config: Any) -> dict[str, object]:
    """Return the settings of a dataclass config that differ from its defaults, leaving out paths and reporting."""
    from dataclasses import MISSING, fields

    hidden = {"output_dir", "logging_dir", "run_name", "report_to", "hub_token", "disable_tqdm", "use_cpu"}
    result: dict[str, object] = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if spec.init and spec.name not in hidden and value != default and isinstance(value, (int, float, str, list)):
            result[spec.name] = getattr(value, "value", value)
    return result
