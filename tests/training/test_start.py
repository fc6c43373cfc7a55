"""A run that starts from a finished student: the same student, its adapters, its base, and what is refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from rdm_sdk import CheckpointError, ConfigError, ModelError, RDMTrainer, digits, plan_memory
from rdm_sdk.cli.main import main

Make = Callable[..., RDMTrainer]
PROMPTS = digits.prompts()[:2]
NOISE = {"seed": 3}


@pytest.fixture(scope="module")
def finished(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[RDMTrainer, Path]:
    """A trained student of another rank and alpha than the default's, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0"])
    trainer = make_trainer(folder / "run", peft_config=lora, learning_rate=1e-2, max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "student"))
    return trainer, folder / "student"


def test_a_run_starts_as_the_student_that_it_is_given(
    finished: tuple[RDMTrainer, Path], make_trainer: Make, tmp_path: Path
) -> None:
    """It makes the same pictures, with the same adapters; critics are as ever; then it learns and exports."""
    before, folder = finished
    fresh = make_trainer(tmp_path / "fresh").sample(PROMPTS, **NOISE)
    trainer = make_trainer(tmp_path / "run", rewards="dm + 0.1*legibility", start_from=str(folder), max_steps=1)
    started = trainer.sample(PROMPTS, **NOISE)
    assert torch.equal(started, before.sample(PROMPTS, **NOISE))
    assert (started - fresh).abs().max() > 1e-3
    student, critic = (trainer.roles.lora_config(role) for role in ("student", "fake"))
    assert (student.r, student.lora_alpha, critic.r) == (4, 12, 4)
    states = (trainer.roles.role_state_dict(role) for role in ("student", "fake"))
    moved, critics = ([t for n, t in state.items() if "lora_B" in n] for state in states)
    assert all(tensor.abs().max() == 0 for tensor in critics)  # critics start as the teacher
    assert any(tensor.abs().max() > 0 for tensor in moved)
    trainer.train()
    assert not torch.equal(trainer.sample(PROMPTS, **NOISE), started)
    trainer.save_model(str(tmp_path / "student"))
    assert f"`{folder}`" in (tmp_path / "student" / "README.md").read_text(encoding="utf-8")


def test_a_full_student_is_started_from(make_trainer: Make, tmp_path: Path) -> None:
    """Its copy goes on in float32."""
    before = make_trainer(tmp_path / "a", student_weights="full")
    with torch.no_grad():
        for parameter in before.parameters_of("student"):
            parameter.mul_(1.01)
    before.save_model(str(tmp_path / "student"))
    settings: dict[str, Any] = {"start_from": str(tmp_path / "student"), "student_weights": "full"}
    trainer = make_trainer(tmp_path / "b", **settings)
    assert torch.equal(trainer.sample(PROMPTS, **NOISE), before.sample(PROMPTS, **NOISE))
    with pytest.raises(ConfigError, match="holds a full copy, and student_weights='lora'; set student_weights='full'"):
        make_trainer(tmp_path / "c", start_from=settings["start_from"])


def test_a_run_goes_on_though_the_student_was_moved(
    finished: tuple[RDMTrainer, Path], make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on another machine: its weights are in the checkpoint. To go on without any, or from one now, is another."""
    here, saving = Path(shutil.copytree(finished[1], tmp_path / "here")), {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "run", start_from=str(here), max_steps=1, **saving).train()
    here.rename(tmp_path / "there")
    with caplog.at_level(logging.WARNING):
        again = make_trainer(tmp_path / "run", start_from=str(tmp_path / "there"), max_steps=2, **saving)
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert f"resuming with another start_from: {str(here)!r} -> " in caplog.text
    lora = LoraConfig.from_pretrained(str(tmp_path / "there" / "peft"))
    lora.inference_mode = False
    with pytest.raises(CheckpointError, match=r"of another run .*start_from"):
        make_trainer(tmp_path / "run", peft_config=lora, max_steps=3).train(resume_from_checkpoint=True)


def test_the_folder_may_be_in_the_home(
    finished: tuple[RDMTrainer, Path], make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave "~" alone in a file of settings and behind an equals sign."""
    monkeypatch.setenv("HOME", str(finished[1].parent))
    trainer = make_trainer(tmp_path, start_from=f"~/{finished[1].name}")
    assert torch.equal(trainer.sample(PROMPTS, **NOISE), finished[0].sample(PROMPTS, **NOISE))


def test_what_cannot_be_started_from_is_refused(
    finished: tuple[RDMTrainer, Path], make_trainer: Make, tmp_path: Path
) -> None:
    """Before anything is trained, with what to do."""
    folder = finished[1]
    with pytest.raises(ModelError, match=r"has no base.json, so it is no student"):
        make_trainer(tmp_path, start_from=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"peft_config and start_from=.* were given"):
        make_trainer(tmp_path, start_from=str(folder), peft_config=LoraConfig(r=4))
    with pytest.raises(ConfigError, match="holds a LoRA, and student_weights='full'"):
        make_trainer(tmp_path, start_from=str(folder), student_weights="full")
    other = StableDiffusion3Pipeline.from_pretrained(digits.teacher_path())
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.1)
    with pytest.raises(ModelError, match="was trained on another base"):
        make_trainer(tmp_path, start_from=str(folder), model=other)
    for name, words in (("adapter_model.safetensors", "cannot be loaded"), ("adapter_config.json", "cannot be read")):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "peft" / name).write_text("{")
        with pytest.raises(ModelError, match=words):
            make_trainer(tmp_path, start_from=str(tmp_path / name))


def test_plan_and_command_line_know_it(
    finished: tuple[RDMTrainer, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    small_config: Any,
    small_teacher: str,
) -> None:
    """A plan counts the student's adapters; flags that describe others are refused."""
    before, folder = finished
    plan = plan_memory(small_teacher, small_config(tmp_path, start_from=str(folder)))
    count = sum(parameter.numel() for parameter in before.parameters_of("student"))
    assert "rank 4, alpha 12" in str(plan)
    assert next(row.parameters for row in plan.rows if row.role == "student") == count
    flags = ["train", "--model", small_teacher, "--use_cpu", "--start_from", str(folder), "--output_dir", str(tmp_path)]
    (tmp_path / "prompts.txt").write_text("a seven\n")
    flags += ["--prompts", str(tmp_path / "prompts.txt")]
    assert main([*flags, "--lora_r", "8"]) == 2
    assert "--lora_r describes adapters, and start_from=" in capsys.readouterr().err
