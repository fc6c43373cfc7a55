"""A run leaves alone what others have in its output folder: files of theirs, and another run's log and settings."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from digit_runs import pictures

from rdm_sdk import CheckpointError, RDMTrainer
from rdm_sdk.cli.main import main
from rdm_sdk.evaluation.report.reading import read_run
from rdm_sdk.training.run_file import write_run_file

Make = Callable[..., RDMTrainer]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "log_images": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def add(path: Path, text: str) -> None:
    """Write to the end of a file, which need not be there."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


@pytest.fixture(scope="module")
def first(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which a run has written its two files."""
    folder = tmp_path_factory.mktemp("first")
    write_run_file(make_trainer(folder, "dm", ["a zero", "a one"]), folder)
    return folder


def prepared(first: Path, folder: Path, before: str) -> Path:
    """Return a folder as `before` says it is when a run begins in it."""
    if before.startswith("ours"):
        shutil.copytree(first, folder)
    folder.mkdir(exist_ok=True)
    if before in ("settings", "both"):
        add(folder / "run.yaml", "# mine\nenv: {WANDB_MODE: offline}\nhub_token: abc\n")
    if before in ("prompts", "both"):
        add(folder / "prompts.jsonl", '{"prompt": "mine"}\n')
    if before == "a binary":
        (folder / "run.yaml").write_bytes(b"\xff\xfe\x00")
    if before == "a folder":
        (folder / "run.yaml").mkdir()
    if before == "a dangling link":
        (folder / "run.yaml").symlink_to(folder / "moved.yaml")
    if before == "ours, with a setting more":
        add(folder / "run.yaml", "max_steps: 7\n")
    if before == "ours, with another rate":
        text = (folder / "run.yaml").read_text(encoding="utf-8")
        (folder / "run.yaml").write_text(text.replace("critic_steps: 2", "critic_steps: 3"), encoding="utf-8")
    if before == "ours, with a prompt more":
        add(folder / "prompts.jsonl", '{"prompt": "mine"}\n')
    if before == "ours, without a head":
        (folder / "run.yaml").unlink()
    return folder


@pytest.mark.parametrize(
    "before",
    [
        *("settings", "prompts", "both", "a binary", "a folder", "a dangling link"),
        *("ours, with a setting more", "ours, with another rate", "ours, with a prompt more", "ours, without a head"),
    ],
)
def test_files_of_others_stay(
    before: str, first: Path, make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run's get a number, a line says which, and the next run replaces these."""
    folder = prepared(first, tmp_path / "run", before)
    theirs = files_of(folder)
    path = write_run_file(make_trainer(folder, "dm", ["a two"], seed=7), folder)
    assert path == folder / "run-2.yaml"
    assert files_of(folder).items() >= theirs.items()
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["prompts"] == str(folder / "prompts-2.jsonl")
    assert (folder / "prompts-2.jsonl").read_text(encoding="utf-8") == '{"prompt": "a two"}\n'
    said = [line for line in caplog.messages if "is not as this SDK wrote it" in line]
    assert len(said) == 1
    assert str(path) in said[0]
    after = files_of(folder)
    assert write_run_file(make_trainer(folder, "dm", ["a three"], seed=8), folder) == path
    assert files_of(folder).keys() == after.keys()
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["seed"] == 8
    assert files_of(folder).items() >= theirs.items()


def test_what_nobody_has_changed_is_replaced(
    first: Path, make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So a folder has the files of its latest run; prompts of the run before go where this one's fit no file."""
    folder = prepared(first, tmp_path / "run", "ours")
    (folder / "prompts.jsonl").unlink()
    for prompts, names in ((["a two"], {"run.yaml", "prompts.jsonl"}), (pictures(), {"run.yaml"})):
        path = write_run_file(make_trainer(folder, "dm", prompts, seed=7), folder)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["seed"] == 7
        assert files_of(folder).keys() == names
    assert caplog.text == ""


def test_a_full_disk_leaves_both_as_they_were(
    first: Path, make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that have changed without the settings would count as somebody's own from then on."""
    folder = prepared(first, tmp_path / "run", "ours")
    before, trainer = files_of(folder), make_trainer(folder, "dm", ["a two"])

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_run_file(trainer, folder)
    assert files_of(folder).items() >= before.items()
    monkeypatch.undo()
    assert write_run_file(trainer, folder) == folder / "run.yaml"


def test_the_file_that_a_run_is_started_with_stays(
    small_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it lies in the run's own folder, with prompts beside it."""
    monkeypatch.setenv("MINE", "")  # which the file sets
    folder = tmp_path / "outputs"
    folder.mkdir()
    text = "# my notes\nenv: {MINE: '1'}\n" + yaml.safe_dump(
        {
            **{"model": small_teacher, "prompts": str(folder / "prompts.jsonl"), "output_dir": str(folder)},
            **{"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_sequence_length": 4},
            **{"guidance_scale": 1.0, "save_strategy": "no", "use_cpu": True, "report_to": "none"},
            "disable_tqdm": True,
        }
    )
    add(folder / "run.yaml", text)
    add(folder / "prompts.jsonl", '{"prompt": "a zero"}\n\n{"prompt": "a one"}\n')
    theirs = files_of(folder)
    for _ in range(2):
        assert main(["train", "--config", str(folder / "run.yaml")]) == 0
        assert files_of(folder).items() >= theirs.items()
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["run-2.yaml", "run.yaml"]
    assert main(["train", "--config", str(folder / "run-2.yaml"), "--output_dir", str(tmp_path / "again")]) == 0


def test_a_run_beside_another_leaves_its_records_alone(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that saves nothing may share a folder: its log, settings and pictures have a folder of their own there."""
    one = make_trainer(tmp_path, max_steps=2, **SAVING)
    one.train()
    before = files_of(tmp_path)
    assert {"log.jsonl", "run.yaml", "prompts.jsonl", "run.json", "trainer_state.json"} < before.keys()
    other = make_trainer(tmp_path, "legibility", ["a zero"], max_steps=1, log_images=1)
    with caplog.at_level(logging.WARNING):
        other.train()
    after = files_of(tmp_path)
    assert after.items() > before.items()
    [place] = {Path(name).parts[0] for name in after.keys() - before.keys()}
    assert "holds checkpoint-2 of another run, whose log and settings stay; those of this run" in caplog.text
    assert str(tmp_path / place) in caplog.text
    found = read_run(tmp_path / place)
    assert found.history == other.state.log_history
    assert [picture["reward"] for picture in found.record["rewards"]] == ["legibility"]
    assert [step for step, _ in found.pictures] == [1]
    assert yaml.safe_load((tmp_path / place / "run.yaml").read_text(encoding="utf-8"))["rewards"] == "legibility"
    assert read_run(tmp_path).history == one.state.log_history
    other.train()  # once more: the same run, in its place
    assert files_of(tmp_path).keys() == after.keys()
    going_on = make_trainer(tmp_path, max_steps=3, **SAVING)
    going_on.train(resume_from_checkpoint=True)
    assert read_run(tmp_path).step == 3
    assert sorted(path.name for path in tmp_path.glob("run*")) == sorted([place, "run.json", "run.yaml"])


def test_the_command_leaves_the_student_of_another_run_alone(small_teacher: str, tmp_path: Path) -> None:
    """Its own goes where its log and settings go."""
    folder = tmp_path / "outputs"
    add(tmp_path / "prompts.txt", "a zero\n")
    settings = {"model": small_teacher, "prompts": tmp_path / "prompts.txt", "output_dir": folder, "use_cpu": True}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_sequence_length": 4}
    settings |= {"guidance_scale": 1, "report_to": "none", "disable_tqdm": True, "save_steps": 1}
    flags = ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]
    assert main([*flags, "--save_strategy", "steps"]) == 0
    before = files_of(folder)
    assert any(name.startswith("student/") for name in before)
    assert main([*flags, "--save_strategy", "no", "--seed", "1"]) == 0
    after = files_of(folder)
    assert after.items() > before.items()
    [place] = {Path(name).parts[0] for name in after.keys() - before.keys()}
    assert (folder / place / "student").is_dir()


@pytest.mark.parametrize("content", [b"GET / 200\n", b'{"url": "/"}\n[1]\n', b"\xff\n"])
def test_a_log_of_something_else_stays(make_trainer: Make, tmp_path: Path, content: bytes) -> None:
    """It is told before anything is trained."""
    (tmp_path / "log.jsonl").write_bytes(content)
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(CheckpointError, match=r"log\.jsonl' is no log of a run.*choose another output_dir"):
        trainer.train()
    assert files_of(tmp_path) == {"log.jsonl": content}
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st', encoding="utf-8")  # of a killed run
    trainer.train()
    assert read_run(tmp_path).history == trainer.state.log_history
