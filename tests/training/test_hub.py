"""`push_to_hub` pushes what `save_model` writes, at the end and while the run trains, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rdm_sdk import ConfigError, RDMTrainer

Make = Callable[..., RDMTrainer]
EXPORT = {
    "README.md",
    "base.json",
    "inference.json",
    "peft/adapter_config.json",
    "peft/adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "scheduler/scheduler_config.json",
}


class Hub:
    """Keeps what an `HfApi` is asked, and which files an upload takes."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.fails = False

    def __call__(self, token: str | None = None) -> Any:
        def create_repo(name: str, **options: Any) -> Any:
            self.made.append({"name": name, "token": token, **options})
            return SimpleNamespace(repo_id=f"me/{name.rpartition('/')[2]}")

        def upload_folder(**options: Any) -> Any:
            if self.fails:
                raise ConnectionError("no route to the Hub")
            folder, patterns = Path(options["folder_path"]), options.get("allow_patterns") or ["*"]
            names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            taken = {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}
            self.uploads.append({**options, "token": token, "files": taken})
            return "a commit"

        return SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_a_run_pushes_its_exports(make_trainer: Make, tmp_path: Path, hub: Hub) -> None:
    """By default at each save, and when the model is saved; always the weights and their card."""
    settings = {"save_strategy": "steps", "save_steps": 1, "hub_model_id": "me/student", "hub_private_repo": True}
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_token="secret", hub_revision="trial", **settings)
    assert hub.made == [{"name": "me/student", "token": "secret", "private": True, "exist_ok": True}]
    trainer.train()
    messages = [upload["commit_message"] for upload in hub.uploads]
    assert messages == ["Training in progress, checkpoint-1", "Training in progress, checkpoint-2"]
    trainer.save_model(str(tmp_path / "student"))
    assert hub.uploads[-1]["commit_message"] == "Model save"
    for upload in hub.uploads:
        assert upload["files"] == EXPORT
        assert (upload["repo_id"], upload["token"], upload["revision"]) == ("me/student", "secret", "trial")
        assert upload.get("run_as_future") in (False, None)
    card = (tmp_path / "README.md").read_text()
    assert "# A 4-step student of" in card


@pytest.mark.parametrize(
    ("strategy", "places"),
    [("end", []), ("checkpoint", ["last-checkpoint"] * 2), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])],
)
def test_the_strategy_says_what_of_checkpoints_is_pushed(
    make_trainer: Make, tmp_path: Path, hub: Hub, strategy: str, places: list[str]
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": strategy}
    make_trainer(tmp_path, push_to_hub=True, **settings).train()
    whole = [upload for upload in hub.uploads if "path_in_repo" in upload]
    assert [upload["path_in_repo"] for upload in whole] == places
    assert all("rdm_manifest.json" in upload["files"] for upload in whole)
    assert len(hub.uploads) == 2 * len(places)


def test_a_student_is_pushed_by_hand(make_trainer: Make, tmp_path: Path, hub: Hub) -> None:
    """With Trainer's arguments, into a repository that is called as the folder unless it is named."""
    trainer = make_trainer(tmp_path / "my-student")
    assert trainer.push_to_hub("by hand", blocking=False, token="other", private=True) == "a commit"
    assert hub.made == [{"name": "my-student", "token": "other", "private": True, "exist_ok": True}]
    (upload,) = hub.uploads
    assert upload["files"] == EXPORT
    assert (upload["commit_message"], upload["run_as_future"], upload["token"]) == ("by hand", True, "other")
    with pytest.raises(ConfigError, match=r"push_to_hub.. takes no language: the model card is"):
        trainer.push_to_hub(language="en")


COPY = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
LORA = {name for name in EXPORT if "adapter_" in name or "lora" in name}


@pytest.mark.parametrize(("weights", "pushed", "other"), [("full", COPY, LORA), ("lora", LORA, COPY)])
def test_the_weights_are_pushed_and_those_of_another_kind_are_not(
    make_trainer: Make, tmp_path: Path, hub: Hub, weights: str, pushed: set[str], other: set[str]
) -> None:
    """Whoever put them into the folder."""
    for name in other:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    make_trainer(tmp_path, student_weights=weights).push_to_hub()
    assert hub.uploads[0]["files"] == EXPORT - LORA | pushed
    assert all((tmp_path / name).is_file() for name in other)


def test_a_hub_that_is_away_stops_no_training(
    make_trainer: Make, tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the push at the end raises."""
    hub.fails = True
    trainer = make_trainer(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "checkpoint-1 could not be pushed to" in caplog.text
    assert "no route to the Hub; training goes on" in caplog.text
    with pytest.raises(ConnectionError, match="no route"):
        trainer.save_model(str(tmp_path / "student"))


@pytest.mark.usefixtures("no_training")
def test_a_repository_that_cannot_be_made_is_refused_at_once(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("401\nInvalid token")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: SimpleNamespace(create_repo=refuse))
    with pytest.raises(ConfigError, match=r"'me/student' cannot be made or reached: 401 Invalid token. Log in"):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id="me/student")
