"""`rdm-sdk plan` takes what `rdm-sdk train` takes: every field of a run reaches the planner."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdm_sdk import RDMConfig, digits
from rdm_sdk.cli.main import main
from rdm_sdk.cli.run_arguments import RunArguments, parse_run
from rdm_sdk.planning.plan import MemoryPlan, PlannedRun
from rdm_sdk.training.inherited import UNSUPPORTED

FIELDS = {s.name: s for kind in (RunArguments, RDMConfig) for s in dataclasses.fields(kind) if s.init}
VALUES: dict[str, Any] = {
    "log_images_limit": 24,
    "log_images_filter": "jpeg >= -2",
    "model": digits.teacher_path(),
    "prompts": "prompts.txt",
    "rewards": "dm + 0.5*legibility",
    "lora_target_modules": ["to_q", "to_k"],
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    **dict.fromkeys(("lr_scheduler_type", "critic_lr_scheduler_type"), "cosine"),
    **dict.fromkeys(("adam_beta1", "critic_adam_beta1", "critic_adam_beta2", "ema_decay"), 0.5),
    **dict.fromkeys(("adam_beta2", "min_effective_sample_size", "min_time", "max_time"), 0.6),
    "resolutions": ["32x32", "64x64"],
    "reward_weights": [2.0],
    "reward_route": "tilt",
    "reward_device": "cpu",
    "weighting": "fixed[cold_start=3]",
    "report_to": ["tensorboard"],
    "max_steps": 7,
    "lr_scheduler_kwargs": {"num_cycles": 2},
    **dict.fromkeys(("log_level", "log_level_replica"), "info"),
    "dataloader_multiprocessing_context": "spawn",
    "torch_compile_mode": "reduce-overhead",
}
"""Fields whose other value is not simply the next number, choice or text."""
BESIDE: dict[str, dict[str, Any]] = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "log_images_limit": {"log_images": 5},
    "log_images_filter": {"log_images": 5},
    "matching": {"sampler": "ode"},
}
"""What a setting wants beside it."""
REFUSED = {
    **dict.fromkeys(UNSUPPORTED, "not supported by the SDK"),
    "tf32": "wants a GPU",
    "ddp_backend": "wants several processes",
    "fsdp": "wants several processes, and a plan is of one that holds the base whole",
    "fsdp_config": "wants fsdp",
    "eval_strategy": "the command line takes no prompts to evaluate with",
    "load_best_model_at_end": "wants an evaluation",
}
"""What `train` refuses too, and why."""
ALWAYS = {
    "use_cpu": "a plan is made without a GPU",
    "dataloader_pin_memory": "transformers switches it off where there is no GPU",
}
"""What is the same in every plan."""


def other_value(name: str) -> Any:
    """Return a value for a field that is not its default."""
    if name in VALUES:
        return VALUES[name]
    default = getattr(parse_run("plan", "", ["--model", "digits"])[0].config, name, FIELDS[name].default)
    hint = str(FIELDS[name].type)
    if isinstance(default, bool) or "bool" in hint:
        return not default
    if hasattr(default, "value"):
        return next(choice.value for choice in type(default) if choice is not default)
    choices = getattr(FIELDS[name].type, "__args__", ()) if "Literal" in hint else ()
    if choices:
        return next(choice for choice in choices if choice != default)
    return (default or 0) + 1 if "int" in hint or "float" in hint else "something"


def same(value: Any, wanted: Any) -> bool:
    """Whether a setting has a value, which transformers may have turned into a choice, a number or a list."""
    value = getattr(value, "value", value)
    if isinstance(wanted, list):
        return [str(getattr(part, "value", part)) for part in value] == list(map(str, wanted))
    return bool(value == wanted or value == [wanted] or str(value).lower() == str(wanted).lower())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return what the planner is asked, field by field; nothing is planned."""
    found: dict[str, Any] = {}

    def plan(run: PlannedRun) -> MemoryPlan:
        found.update(dataclasses.asdict(RunArguments(model=str(run.model), rewards=run.reward_funcs)))
        found.update({name: getattr(run.args, name) for name in FIELDS if hasattr(run.args, name)})
        if lora := run.peft_config or run.fake_peft_config:  # there is none where the run starts from a student
            found.update(lora_r=lora.r, lora_alpha=lora.lora_alpha, lora_target_modules=lora.target_modules)
        return MemoryPlan((), "nothing")

    monkeypatch.setattr(PlannedRun, "plan", plan)
    monkeypatch.setattr("rdm_sdk.training.validation.check_compiler", lambda *_: None)  # it wants a C++ compiler
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a seven\n")
    return found


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in REFUSED])
def test_every_field_reaches_the_planner(name: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """A value other than the default, in the file that `train --config` takes."""
    value = other_value(name)
    settings = {"model": "digits", **BESIDE.get(name, {}), name: value}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["plan", "--config", "run.yaml", "--memory", "1"]) == 0
    if name in ("prompts", "save_to"):
        return  # they take no device memory; the prompts' file is read
    name = {"gradient_checkpointing": "activation_checkpointing"}.get(name, name)  # the older of its names
    if name in ALWAYS:
        assert asked[name] == (name == "use_cpu")
    elif name == "lora_target_modules":
        assert set(asked[name]) == set(value)
    else:
        assert same(asked[name], value), (asked[name], value)


@pytest.mark.parametrize("name", ["fp16", "eval_strategy", "load_best_model_at_end"])
def test_what_training_refuses_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same words, before anything is planned or trained."""
    value = "steps" if name == "eval_strategy" else True
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"model": "digits", "eval_steps": 5, "use_cpu": True, name: value})
    )
    complaints = []
    for command in ("train", "plan"):
        assert main([command, "--config", str(tmp_path / "run.yaml")]) == 2
        complaints.append(capsys.readouterr().err)
    assert complaints[0] == complaints[1]
