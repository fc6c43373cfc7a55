"""What `rdm-sdk plan` offers where a run does not fit, and what it says on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from peft import LoraConfig
from planned_runs import SMALL, plan_of, settings

from rdm_sdk import ConfigError, ModelError, RDMConfig, digits
from rdm_sdk.cli.main import main
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.planning import blueprint as blueprints
from rdm_sdk.planning.advice import Switch, advise, show_advice, switched, switches
from rdm_sdk.planning.blueprint import CONFIGS, blueprint
from rdm_sdk.planning.plan import PlannedRun

# ---- Advice -----------------------------------------------------------------------------------------------------


def advised_run(folders: Path, tmp_path: Path, **changed: Any) -> PlannedRun:
    configs = folders / "configs" / SMALL
    args = settings(SMALL, blueprint(configs, torch.float32), tmp_path, **changed)
    return PlannedRun(configs, args, "dm + 0.5*legibility", LoraConfig(r=16, lora_alpha=16))


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_advice_is_what_the_switched_run_takes(folders: Path, tmp_path: Path, every: int) -> None:
    """Each switch is planned alone, the largest first; a plan made afresh (of each, or of some) has the same total."""
    run = advised_run(folders, tmp_path)
    before = run.plan().total
    memory = int(0.6 * before)
    savings = advise(run, memory)
    assert [one.saved for one in savings] == sorted((one.saved for one in savings), reverse=True)
    assert {one.fits for one in savings} == {True, False}
    for one in savings:
        assert one.fits == (before - one.saved <= memory)
    for one in savings[::every]:
        fresh = switched(advised_run(folders, tmp_path), one.switch).plan()
        assert before - fresh.total == one.saved > 0
    assert run.plan().total == before  # the run itself is as it was
    lines = show_advice(savings).splitlines()[1:]
    assert [line.split("  ")[1] for line in lines] == [str(one.switch) for one in savings]
    assert [line.endswith("GB, then it fits") for line in lines] == [one.fits for one in savings]


def test_advice_says_when_nothing_helps() -> None:
    """A run with nothing to switch on."""
    assert "take a larger device, or smaller images" in show_advice([])


def test_switches_are_written_as_flags() -> None:
    """As on the command line."""
    assert str(Switch("text_encoders", "drop")) == "--text_encoders drop"
    assert str(Switch("vae_offload", True)) == "--vae_offload"
    assert str(Switch("lora_r", 8)) == "--lora_r 8"


def test_a_batch_is_halved_in_whole_groups(folders: Path, tmp_path: Path) -> None:
    """Of three groups of two, one is left; one group is not halved."""
    for size, half in ((6, 2), (8, 4), (2, None)):
        run = advised_run(folders, tmp_path, per_device_train_batch_size=size)
        sizes = [switch.value for switch in switches(run) if switch.name == "per_device_train_batch_size"]
        assert sizes == ([] if half is None else [half])


def test_switches_that_are_on_are_not_offered(folders: Path, tmp_path: Path) -> None:
    """Nor those that exclude what is on."""
    on = {"activation_checkpointing": True, "text_encoders": "offload", "vae_offload": True, "vae_slicing": True}
    on |= {"optim": "adamw_8bit", "reward_offload": True, "reward_batch_size": 1, "per_device_train_batch_size": 2}
    on |= {"reward_route": "advantage"}
    run = advised_run(folders, tmp_path, **on)
    assert [str(switch) for switch in switches(run)] == [
        "--text_encoders drop",
        "--quantization 8bit",
        "--quantization 4bit",
        "--lora_r 8",
    ]
    args = RDMConfig(output_dir=str(tmp_path), use_cpu=True, student_weights="full", report_to="none")
    offered = [str(switch) for switch in switches(PlannedRun(run.model, args))]
    assert "--student_weights lora" in offered
    assert not any("quantization" in switch for switch in offered)


# ---- The command line -------------------------------------------------------------------------------------------

FEW = ["--num_generations", "2", "--max_sequence_length", "4"]


def test_the_digits_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per part, and exit status 0 where it fits."""
    assert main(["plan", "--model", "digits", "--per_device_train_batch_size", "4", *FEW, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    rows = ("base", "student", "fake", "optimizer", "VAE", "text encoders", "gradients", "activations", "total")
    for row in rows:
        assert re.search(rf"^{row} .*\d\.\d\d", printed, re.MULTILINE), row
    assert "fits into 1.00 GB" in printed


def test_too_little_memory_is_said_before_loading(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and advice; there are no weights to load; the flags that are advised lead to exit status 0."""
    configs = str(folders / "configs" / SMALL)
    command = ["plan", "--model", configs, "--per_device_train_batch_size", "8", *FEW, "--height", "64", "--width"]
    command += ["64", "--rewards", "dm + 0.5*legibility"]
    # Switched on already, and so not planned once more.
    command += ["--text_encoders", "drop", "--vae_offload", "--vae_slicing", "--reward_offload", "--lora_r", "4"]
    command += ["--optim", "adamw_8bit"]
    memory = ["--memory", "0.01"]
    assert main([*command, *memory]) == 1
    printed = capsys.readouterr().out
    assert "does not fit into 0.01 GB; what each of these would save by itself:" in printed
    flags = re.findall(r"^  (--.*?)  +\d+\.\d\d GB, then it fits$", printed, re.MULTILINE)
    assert flags
    for advised in flags:
        assert main([*command, *memory, *advised.split()]) == 0, advised


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nowhere"], "there is no such folder"),
        (["--model", "{empty}"], "the folder has no model_index.json"),
        (["--model", "{video}"], "WanPipeline is not supported"),
        (["--model", "{broken}"], "cannot build the pipeline in"),
        (["--model", "{torn}"], "cannot read"),
        (
            ["--model", "digits", "--per_device_train_batch_size", "6", "--num_generations", "4"],
            "must be a multiple of num_generations=4",
        ),
        (["--model", "digits", "--memory", "0"], "--memory must be a positive number of GB; got 0.0"),
        (["--model", "digits", "--lora_r", "0"], "--lora_r must be at least 1; got 0"),
        (["--model", "digits", "--rewards", "dm + klip"], "klip"),
        (["--model", "digits", "--optim", "adamm"], "invalid choice: 'adamm'"),
        (["--model", "digits", "--height", "33", "--width", "32"], "positive multiples of 8"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be planned is said in one line."""
    for name, index in (("video", {"_class_name": "WanPipeline"}), ("broken", {"_class_name": "FluxPipeline"})):
        (tmp_path / name).mkdir()
        index |= {} if name == "video" else {"transformer": ["diffusers", "FluxTransformer2DModel"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("{")
    places = {name: str(tmp_path / name) for name in ("empty", "video", "broken", "torn")}
    assert main(["plan", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("rdm-sdk: ")]) == 1


def test_only_configs_are_downloaded(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id, the JSON files that say shapes; a hub that cannot be reached is said to be so."""
    import huggingface_hub

    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        if repository == "some/where":
            raise OSError("no route to host")
        return str(folders / "configs" / "FluxPipeline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert blueprint("some/flux", torch.float32).base_name == "some/flux"
    assert asked == [("some/flux", list(CONFIGS))]
    assert all(pattern.endswith(".json") for pattern in CONFIGS)
    with pytest.raises(
        ModelError, match="cannot reach the hub for the configs of 'some/where': OSError: no route to ho"
    ):
        blueprint("some/where", torch.float32)


def test_a_loaded_model_is_not_planned() -> None:
    """Its configs have to be named; and a family that has no example is named itself."""
    with pytest.raises(ModelError, match="pass its hub id or the path of its folder; got a list"):
        blueprints.blueprint([], torch.float32)

    class Plain(type(load_family(digits.teacher_path(), torch.float32))):  # type: ignore[misc]
        example_encoding = ModelFamily.example_encoding

    with pytest.raises(ModelError, match="Plain names no example_encoding"):
        Plain(blueprint(digits.teacher_path(), torch.float32).pipeline).example_encoding(1)


def test_planning_says_what_training_says(folders: Path, tmp_path: Path) -> None:
    """LoRA configs that cannot be used are refused here too."""
    with pytest.raises(ConfigError, match="lora_dropout"):
        plan_of(folders, tmp_path, lora=LoraConfig(r=4, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="peft_config describes adapters"):
        plan_of(folders, tmp_path, lora=LoraConfig(r=4), student_weights="full")


# ---- A GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sd3", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_is_what_a_gpu_allocates(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """True shapes with random weights at 512 pixels: the allocator's peak is the plan's, activations within 20 %.

    With `pytest -s`, it prints the figures and the time of a step.
    """
    settings = {
        "height": 512,
        "width": 512,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": checkpointing,
    }
    run = full_size.Run(f"{kind}, {checkpointing=}", kind, settings)
    measured = full_size.measure(run, full_size.shapes_of(tmp_path, kind))
    print(f"\n{full_size.table([measured])}")
    assert measured["planned_activations_gb"] == pytest.approx(measured["allocated_activations_gb"], rel=0.2)
    assert measured["planned_gb"] == pytest.approx(measured["allocated_gb"], rel=0.1)
