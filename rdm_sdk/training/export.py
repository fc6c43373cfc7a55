"""What a trained student leaves behind: files that plain diffusers and PEFT load."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rdm_sdk.errors import ConfigError, ModelError, described, shown
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.lora_files import kohya_names
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.files import replacing
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.rewards.spec import show_spec, without_places
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.inherited import chosen_settings
from rdm_sdk.training.student_base import (
    BASE,
    PEFT_FOLDER,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    WEIGHTS,
    check_adapters_fit,
    check_base,
    describe_base,
    exported_weights,
    network_of,
    read_base,
    read_json,
    source_of,
)

CALL = "inference.json"
"""The arguments of a pipeline call that samples the student."""
SCHEDULER = "scheduler/scheduler_config.json"

CARD = "README.md"
_PLACES = ("output_dir", "logging_dir", "resume_from_checkpoint", "prompt_cache")
UNTOLD = (*_PLACES, "run_name", "report_to", "hub_token", "disable_tqdm", "use_cpu")
"""Settings that the card leaves out: places, reporting, secrets."""


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
    sizes: Sequence[tuple[int | None, int | None]] = ((None, None),)
    """Heights and widths that it was trained at, the first of them that of the exported call; None is the model's."""


def student_info(args: RDMConfig, shift: float | None, rewards: Sequence[WeightedReward]) -> StudentInfo:
    """Return what is said about a run's student on a grid with this shift."""
    stochastic = args.sampler == "renoise"
    chosen = {name: value for name, value in chosen_settings(args).items() if name not in UNTOLD}
    settings = {name: value for name, value in chosen.items() if isinstance(value, (int, float, str, list))}
    return StudentInfo(args.num_inference_steps, shift, stochastic, args.guidance_scale, rewards, settings, args.sizes)


def check_exportable(family: ModelFamily) -> None:
    """Raise `ModelError` if a LoRA on a family's pipeline could not be saved: at the end, that would be too late."""
    if type(family).save_lora is ModelFamily.save_lora and not hasattr(type(family.pipeline), "save_lora_weights"):
        raise ModelError(
            f"{type(family.pipeline).__name__} has no save_lora_weights, so a LoRA student could not be exported. "
            f"Train student_weights='full', or override save_lora() and loading_code in {type(family).__name__}"
        )


def check_target(directory: str | Path) -> None:
    """Raise `ConfigError` if an export into a folder would replace a README of someone else's, or write through a link.

    Training takes days and an export comes last, so ask before.
    """
    folder = Path(directory)
    readme = folder / CARD
    if readme.exists() and "rdm-sdk" not in readme.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{readme} is no model card of rdm-sdk and would be overwritten; move it away, or choose another folder"
        )
    for link in folder.glob("*/") if folder.is_dir() else ():
        if link.is_symlink():
            raise ConfigError(
                f"{link} is a link to a folder, and an export would write through it; remove it, or take another folder"
            )


def save_student(directory: str | Path, family: ModelFamily, info: StudentInfo) -> None:
    """Write the student role's current weights, its scheduler, the call that samples it and a model card into a folder.

    Files of a LoRA: `pytorch_lora_weights.safetensors` (diffusers, with LoRA metadata: without it, an alpha other than
    the rank would load wrongly and silently; not where the pipeline cannot load it) and `peft/`. Of a full copy: the
    component's own folder, in the base's dtype. Of both: `scheduler/`, `inference.json`, `base.json` (which base it is
    for) and `README.md`. Everything is written beside the folder first and then moved in file by file, so that an
    earlier export is never left half overwritten. Weights of an earlier export that this one did not replace, of a
    student of another kind, are removed after that: plain diffusers would load them.

    Raises:
        ConfigError: the folder holds a README that is no model card of this SDK's, or a link to another folder.
    """
    check_target(directory)
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
        base = describe_base(family.pipeline, family.component, "full" if STUDENT in family.roles.copies else "lora")
        (staged / BASE).write_text(json.dumps(base, indent=2), encoding="utf-8")
        (staged / CALL).write_text(json.dumps(_call(family, info), indent=2), encoding="utf-8")
        (staged / CARD).write_text(model_card(family, info), encoding="utf-8")
        earlier = exported_weights(target)
        written = {target / path.relative_to(staged) for path in staged.rglob("*") if path.is_file()}
        move_into(staged, target)
        for stale in set(earlier) - written:
            stale.unlink()
            with suppress(OSError):  # what is somebody's own stays, and the folder with it
                stale.parent.rmdir()


def _save_lora(staged: Path, family: ModelFamily) -> None:
    state = family.roles.role_state_dict(STUDENT)
    config = family.roles.lora_config(STUDENT)
    family.save_lora(staged, state, config.to_dict())
    (staged / PEFT_FOLDER).mkdir()
    save_file(
        {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()},
        staged / PEFT_WEIGHTS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(staged / PEFT_FOLDER))


def _call(family: ModelFamily, info: StudentInfo) -> dict[str, Any]:
    """Return the arguments of a pipeline call that samples the student at the (first) size it was trained for."""
    # Pipelines have a size of their own for calls that name none, which need be neither the run's nor the base's.
    height, width = _sizes(family, info)[0]
    return family.inference_call(info.num_steps, info.guidance_scale) | {"height": height, "width": width}


def _sizes(family: ModelFamily, info: StudentInfo) -> list[tuple[int, int]]:
    """Return the heights and widths in pixels that a student was trained at."""
    height, width = family.default_size
    return [(height if h is None else h, width if w is None else w) for h, w in info.sizes]


def load_student(pipeline: Any, directory: str | Path, *, other_base: bool = False) -> dict[str, Any]:
    """Load a trained student into a plain pipeline of its base, with nothing but diffusers and PEFT.

    The pipeline is compared with what `base.json` says of the base, and with names and shapes of the student's weights,
    before anything about it is changed.

    Args:
        pipeline: a loaded pipeline; its weights and its scheduler become the student's.
        directory: the folder that training saved.
        other_base: take another base of the same family, such as a fine-tune; its pictures were never trained for.

    Returns:
        The arguments with which the pipeline is called, beside the prompt.

    Raises:
        ModelError: the folder holds no whole student, or none for this pipeline.
    """
    folder = Path(directory)
    base = _read_base(pipeline, folder)
    check_base(pipeline, base, folder, other_base)
    scheduler, call = _read_scheduler(folder), read_call(folder)
    component = base["component"]
    network: Any = network_of(pipeline, component)
    full = base["weights"] == "full"
    if full and getattr(pipeline, component) is not network:
        raise ModelError(f"the pipeline's {component} is compiled; load the student first, and compile it then")
    loads = hasattr(pipeline, "load_lora_weights") and (folder / WEIGHTS).is_file()
    if not full:
        check_adapters_fit(network, folder / (WEIGHTS if loads else PEFT_WEIGHTS), component)
    try:
        if full:
            student = type(network).from_pretrained(folder, subfolder=component, torch_dtype=network.dtype)
            pipeline.register_modules(**{component: student.to(network.device)})
        elif loads:
            pipeline.load_lora_weights(str(folder))
        else:
            PeftModel.from_pretrained(network, str(folder / PEFT_FOLDER))  # puts its layers into the network itself
    except Exception as error:  # diffusers and PEFT raise whatever a damaged file leads to
        raise ModelError(
            f"the student in {str(folder)!r} cannot be loaded: {described(error)}. Copy the whole folder that training "
            "saved again, and load the pipeline anew"
        ) from error
    pipeline.scheduler = scheduler
    return call


def _read_scheduler(folder: Path) -> Any:
    """Return the student's scheduler; raises `ModelError` if its file is damaged."""
    config = read_json(folder, SCHEDULER)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ModelError(
            f"{SCHEDULER} in {str(folder)!r} names no scheduler of diffusers {diffusers.__version__}: "
            f"{shown(config.get('_class_name'), 60)}"
        )
    try:
        return kind.from_config(config)
    except Exception as error:  # what a value that is not of its kind leads to
        raise ModelError(f"{SCHEDULER} in {str(folder)!r} is damaged: {described(error)}") from error


def read_call(folder: Path) -> dict[str, Any]:
    """Return the call that samples an exported student (`inference.json`).

    Raises:
        ModelError: the folder holds no student, or the file is damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}; give the one that training saved a student to")
    call = read_json(folder, CALL)
    steps = call.get("num_inference_steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ModelError(f"{CALL} in {str(folder)!r} is damaged: num_inference_steps is {shown(steps, 60)}")
    return call


def _read_base(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Return what an export says of its base.

    Raises:
        ModelError: the folder holds no student that the pipeline can load, or a part of it is missing.
    """
    readable = [WEIGHTS, PEFT_WEIGHTS] if hasattr(pipeline, "load_lora_weights") else [PEFT_WEIGHTS]
    lora = any((folder / name).is_file() for name in readable)
    copies = [path.parent.name for path in folder.glob("*/config.json")]
    if not lora and not copies:
        raise ModelError(
            f"there is no student for a {type(pipeline).__name__} in {str(folder)!r} (no {WEIGHTS} that it loads, "
            f"no {PEFT_FOLDER}/ and no component's folder); give the folder that training saved"
        )
    missing = [name for name in (BASE, SCHEDULER, CALL) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"the student in {str(folder)!r} is not whole: it has no {' and no '.join(missing)}; copy the whole folder "
            "that training saved, or save it again with trainer.save_model()"
        )
    base = read_base(folder)
    present = base["component"] in copies if base["weights"] == "full" else lora
    if not present:
        raise ModelError(
            f"the student in {str(folder)!r} is {'a full copy' if base['weights'] == 'full' else 'a LoRA'}, and its "
            "weights are not there; copy the whole folder that training saved"
        )
    return base


def save_kohya_lora(directory: str | Path, file: str | Path) -> Path:
    """Write a student of Stable Diffusion 1, 2 or XL as one file that ComfyUI reads (kohya's names), and return it.

    Set steps, scheduler and guidance there as `inference.json` says. LoRAs of other families are read as they are.

    Args:
        directory: the folder that training saved.
        file: the `.safetensors` file to write.

    Raises:
        ModelError: the folder holds no LoRA of a UNet.
    """
    folder, target = Path(directory), Path(file)
    base = read_base(folder) if (folder / BASE).is_file() else {}
    if base.get("network") != "UNet2DConditionModel" or not (folder / WEIGHTS).is_file() or base["weights"] != "lora":
        raise ModelError(
            f"kohya's names are those of a UNet's LoRA, and {str(directory)!r} holds none (no {WEIGHTS} with a {BASE} "
            "that says so); give the folder of a student of Stable Diffusion 1, 2 or XL"
        )
    with replacing(target) as staged:
        save_file(kohya_names(load_file(folder / WEIGHTS), base["component"]), staged, metadata={"format": "pt"})
    return target


def move_into(staged: Path, target: Path) -> None:
    """Move every file below `staged` to the same place below `target`, replacing each as a whole."""
    for source in sorted(path for path in staged.rglob("*") if path.is_file()):
        destination = target / source.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        # What safetensors writes is private to its owner; an export is to be shared like any other file.
        shutil.copymode(target, source)
        source.chmod(source.stat().st_mode & 0o666)
        source.replace(destination)


def model_card(family: ModelFamily, info: StudentInfo) -> str:
    """Return the model card: base, method, rewards, settings, and the code that samples the student."""
    rewards = show_spec([without_places(reward.term) for reward in info.rewards])
    origins = ", ".join(dict.fromkeys(str(reward.reward.provenance()["origin"]) for reward in info.rewards))
    full = STUDENT in family.roles.copies
    base, loading_base, hub_id = _base_of(family)
    pipeline = type(family.pipeline).__name__
    scheduler = type(family.student_scheduler(info.num_steps, info.shift, info.stochastic)).__name__
    data = ModelCardData(
        base_model=hub_id,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["rdm-sdk", *([] if full else ["lora"]), "distillation", "few-step", "diffusers"],
    )
    grid = ", ".join(f"{sigma:g}" for sigma in family.student_sigmas(info.num_steps, info.shift))
    settings = "\n".join(f"| `{setting}` | `{value}` |" for setting, value in info.settings.items())
    noising = "noises it again" if info.stochastic else "moves straight on to the next level"
    call = ", ".join(f"{argument}={value!r}" for argument, value in _call(family, info).items())
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
        if type(family).save_lora is ModelFamily.save_lora:
            weights += f"; in `{WEIGHTS}`, alpha / rank is in the weights, so load it at strength 1"
    text = f"""
# A {info.num_steps}-step student of {base.replace("`", "")}

{what} that sample{"" if full else "s"} {base} in {info.num_steps} steps without a second pass for
guidance, distilled with [rdm-sdk](https://pypi.org/project/rdm-sdk/) by distribution matching as a reward
([arXiv 2603.28460](https://arxiv.org/abs/2603.28460)).

```python
from diffusers import {imports}

folder = "path/to/this/folder"
{loading_base}
{loading}
pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
image = pipe(prompt="{{your prompt}}", {call}).images[0]
```

{_cautions(family, info)}
- Trained at height x width: {", ".join(f"{height} x {width}" for height, width in _sizes(family, info))}
- Rewards: `{rewards}` (from {origins})
- Noise levels of the steps: {grid} (in `scheduler/`; each step predicts the image and {noising})
- {weights}
- Its base in more words: `base.json`, by which rdm-sdk's `load_student` and `rdm-sdk sample` tell another one

| setting | value |
|---|---|
{settings}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _base_of(family: ModelFamily) -> tuple[str, str, str | None]:
    """Return what the card calls the base, its code that loads it, and its hub id, None where it has none.

    A pipeline put together in memory has no name, and one that LoRAs were fused into is not what its name says.
    """
    kind, source, name = type(family.pipeline).__name__, source_of(family.pipeline), family.base_name
    words = f"a {kind}" if name == kind else f"`{' '.join(name.replace('`', chr(39)).split())}`"
    if source is not None:
        literal = repr(source).replace("`", r"\x60")  # a backtick could end the block of code
        return words, f"pipe = {kind}.from_pretrained({literal})", None if Path(source).exists() else source
    words += " with LoRAs fused into it" if getattr(family.pipeline, "num_fused_loras", 0) else ""
    why = f"# The base, {words}, was a pipeline in memory: save it with save_pretrained(), and load that."
    return f"{words} (a pipeline in memory)", f'{why}\npipe = {kind}.from_pretrained("path/to/the/base")', None


def _cautions(family: ModelFamily, info: StudentInfo) -> str:
    """Return what the card says of calls that would make other pictures than the student's, or none."""
    lines = [
        f"- `num_inference_steps` must be {info.num_steps}: plain diffusers takes any number and follows another grid, "
        "which the student never saw; the result is poor, noise, or an error"
    ]
    if info.stochastic and not hasattr(family.pipeline, "prepare_extra_step_kwargs"):
        lines.append(
            f"- Call `torch.manual_seed(...)` before the pipeline to repeat a picture: `generator=` sets the first "
            f"noise alone, because {type(family.pipeline).__name__} does not pass it to the scheduler, which noises "
            "again at each step"
        )
    return "\n".join(lines)
