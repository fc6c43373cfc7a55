"""What a trained student leaves behind: files that plain diffusers and PEFT load."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from safetensors.torch import save_file

from rdm_sdk.errors import ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.rewards.spec import show_spec
from rdm_sdk.training.config import RDMConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` reads, of the pipelines that have it."""
PEFT_FOLDER = "peft"
CALL = "inference.json"
"""The arguments of a pipeline call that samples the student."""


@dataclass(frozen=True)
class StudentInfo:
    """What the export says about a student beside its weights."""

    num_steps: int
    shift: float | None
    stochastic: bool
    """Whether its sampler re-noises."""
    guidance_scale: float
    """The training run's."""
    rewards: Sequence[WeightedReward]
    settings: Mapping[str, object]
    """The settings that differ from the defaults, for the model card."""


def student_info(args: RDMConfig, shift: float | None, rewards: Sequence[WeightedReward]) -> StudentInfo:
    """Return what is said about a run's student on a grid with this shift."""
    stochastic = args.sampler == "renoise"
    settings = non_default_settings(args)
    return StudentInfo(args.num_inference_steps, shift, stochastic, args.guidance_scale, rewards, settings)


def save_student(directory: str | Path, family: ModelFamily, info: StudentInfo) -> None:
    """Write the student role's current weights, its scheduler, the call that samples it and a model card into a folder.

    Files of a LoRA: `pytorch_lora_weights.safetensors` (diffusers, with LoRA metadata: without it, an alpha other than
    the rank would load wrongly and silently; not where the pipeline cannot load it) and `peft/`. Of a full copy: the
    component's own folder, in the base's dtype. Of both: `scheduler/`, `inference.json` and `README.md`. Everything is
    written beside the folder first and then moved in file by file, so that an earlier export is never left half
    overwritten.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as scratch:
        staged = Path(scratch)
        if STUDENT in family.roles.copies:
            student: Any = copy.deepcopy(family.roles.copies[STUDENT]).to(family.backbone.dtype)
            student.save_pretrained(staged / family.component)
        else:
            _save_lora(staged, family)
        family.student_scheduler(info.num_steps, info.shift, info.stochastic).save_pretrained(staged / "scheduler")
        (staged / CALL).write_text(json.dumps(_call(family, info), indent=2), encoding="utf-8")
        (staged / "README.md").write_text(model_card(family, info), encoding="utf-8")
        move_into(staged, target)


def _save_lora(staged: Path, family: ModelFamily) -> None:
    state = family.roles.role_state_dict(STUDENT)
    config = family.roles.lora_config(STUDENT)
    family.save_lora(staged, state, config.to_dict())
    (staged / PEFT_FOLDER).mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in state.items()},
        staged / PEFT_FOLDER / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(staged / PEFT_FOLDER))


def _call(family: ModelFamily, info: StudentInfo) -> dict[str, Any]:
    """Return the arguments of a pipeline call that samples the student at the size it was trained for."""
    arguments = family.inference_call(info.num_steps, info.guidance_scale)
    # Pipelines have a size of their own for calls that name none, which need be neither the run's nor the base's.
    for name, default in zip(("height", "width"), family.default_size, strict=True):
        arguments[name] = info.settings.get(name, default)
    return arguments


def load_student(pipeline: Any, directory: str | Path) -> dict[str, Any]:
    """Load a trained student into a plain pipeline of its base, with nothing but diffusers and PEFT.

    Args:
        pipeline: a loaded pipeline; its weights and its scheduler become the student's.
        directory: the folder that training saved.

    Returns:
        The arguments with which the pipeline is called, beside the prompt.

    Raises:
        ModelError: the folder holds no student, or none that the pipeline can load.
    """
    folder = Path(directory)
    copies = [name for name in ("transformer", "unet") if (folder / name).is_dir()]
    if copies:
        network: Any = getattr(pipeline, copies[0])
        student = type(network).from_pretrained(folder, subfolder=copies[0], torch_dtype=network.dtype)
        pipeline.register_modules(**{copies[0]: student.to(network.device)})
    elif hasattr(pipeline, "load_lora_weights") and (folder / WEIGHTS).is_file():
        pipeline.load_lora_weights(str(folder))
    elif (folder / PEFT_FOLDER / "adapter_model.safetensors").is_file():
        parts = pipeline.components
        backbone = parts["transformer"] if "transformer" in parts else parts["unet"]
        PeftModel.from_pretrained(backbone, str(folder / PEFT_FOLDER))  # puts its layers into the backbone itself
    else:
        raise ModelError(
            f"there is no student for a {type(pipeline).__name__} in {str(directory)!r} (no {WEIGHTS} that it loads, "
            f"no {PEFT_FOLDER}/ and no transformer/ or unet/); give the folder that training saved"
        )
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    pipeline.scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    call: dict[str, Any] = json.loads((folder / CALL).read_text(encoding="utf-8"))
    return call


def move_into(staged: Path, target: Path) -> None:
    """Move every file below `staged` to the same place below `target`, replacing each as a whole."""
    for source in sorted(path for path in staged.rglob("*") if path.is_file()):
        destination = target / source.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Files of a temporary folder are private to their owner; an export is to be shared like any other file.
        shutil.copymode(target, source)
        source.chmod(source.stat().st_mode & 0o666)
        source.replace(destination)


def model_card(family: ModelFamily, info: StudentInfo) -> str:
    """Return the model card: base, method, rewards, settings, and the code that samples the student."""
    rewards = show_spec([reward.term for reward in info.rewards])
    origins = ", ".join(dict.fromkeys(str(reward.reward.provenance()["origin"]) for reward in info.rewards))
    full = STUDENT in family.roles.copies
    pipeline = type(family.pipeline).__name__
    scheduler = type(family.student_scheduler(info.num_steps, info.shift, info.stochastic)).__name__
    data = ModelCardData(
        base_model=family.base_name if not Path(family.base_name).exists() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["rdm-sdk", *([] if full else ["lora"]), "distillation", "few-step", "diffusers"],
    )
    grid = ", ".join(f"{sigma:g}" for sigma in family.student_sigmas(info.num_steps, info.shift))
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in info.settings.items())
    noising = "noises it again" if info.stochastic else "moves straight on to the next level"
    call = ", ".join(f"{name}={value!r}" for name, value in _call(family, info).items())
    if full:
        network = type(family.backbone).__name__
        imports, part = f"{network}, {pipeline}, {scheduler}", family.component
        loading = f'pipe.{part} = {network}.from_pretrained(folder, subfolder="{part}")'
        what, weights = "Full weights", f"The weights of the {part}: `{part}/`"
    else:
        lora = family.roles.lora_config(STUDENT)
        imports, loading = f"{pipeline}, {scheduler}", family.loading_code
        what = f"A LoRA (rank {lora.r}, alpha {lora.lora_alpha})"
        weights = f"The weights in PEFT's format: `{PEFT_FOLDER}/`"
    text = f"""
# A {info.num_steps}-step student of {family.base_name}

{what} that sample{"" if full else "s"} `{family.base_name}` in {info.num_steps} steps without a second pass for
guidance, distilled with [rdm-sdk](https://pypi.org/project/rdm-sdk/) by distribution matching as a reward
([arXiv 2603.28460](https://arxiv.org/abs/2603.28460)).

```python
from diffusers import {imports}

folder = "path/to/this/folder"
pipe = {pipeline}.from_pretrained("{family.base_name}")
{loading}
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
image = pipe(prompt="{{your prompt}}", {call}).images[0]
```

- Rewards: `{rewards}` (from {origins})
- Noise levels of the steps: {grid} (in `scheduler/`; each step predicts the image and {noising})
- {weights}

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
        if value == [] or (default is None and value is False):
            continue  # what Trainer makes of settings that nobody touched
        if spec.init and spec.name not in hidden and value != default and isinstance(value, (int, float, str, list)):
            result[spec.name] = getattr(value, "value", value)
    return result
