"""Trackers get scalars, pictures, and what the run is: reward spec, base, LoRA settings, prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from rdm_sdk import RDMTrainer, digits

Make = Callable[..., RDMTrainer]
FIGURES = {"train/loss", "train/dm/gap", "train/student/diversity", "train/rewards/jpeg/mean"}


def trained(make_trainer: Make, folder: Path, tracker: str) -> dict[str, Any]:
    """Train two steps with a tracker and a picture at the second; return what the run is."""
    trainer = make_trainer(
        folder,
        "dm + 0.5*jpeg",
        report_to=tracker,
        log_images=2,
        run_name="tried",
        project="rdm",
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    trainer.train()
    return {
        "base": trainer.family.base_name,
        "rewards": "dm + 0.5*jpeg",
        "routes": {"dm": "gradient", "jpeg": "advantage"},
        "lora": {"student": "rank 4, alpha 8", "fake": "rank 4, alpha 8, told which of 4 steps made a sample"},
        "prompts": digits.prompts(),
        "number_of_prompts": 10,
    }


def test_tensorboard(make_trainer: Make, tmp_path: Path) -> None:
    """Read back with its reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(make_trainer, tmp_path, "tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events.parent)).Reload()
    assert set(log.Tags()["scalars"]) >= FIGURES
    (picture,) = log.Images("pictures")
    assert picture.step == 2
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    (text,) = log.Tensors("run/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    assert all(f"| {name} | {value} |" in told for name, value in run.items())


@pytest.mark.slow
def test_wandb_offline(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network or an account; what it is given is seen, and that its run's file holds it."""
    wandb = pytest.importorskip("wandb", reason="needs rdm-sdk[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trained(make_trainer, tmp_path / "run", "wandb")
    seen = wandb.run
    try:
        assert dict(seen.config)["run"] == run
        assert set(seen.summary.keys()) >= FIGURES | {"pictures"}
        assert seen.summary["pictures"]["_type"] == "image-file"
    finally:
        wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/pictures_*.png"))


@pytest.mark.slow
def test_trackio(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into its local database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs rdm-sdk[trackio]")
    from trackio.sqlite_storage import SQLiteStorage

    run = trained(make_trainer, tmp_path / "run", "trackio")
    logs = SQLiteStorage.get_logs("rdm", "tried")
    assert {name for row in logs for name in row} >= FIGURES | {"pictures"}
    (picture,) = [row["pictures"] for row in logs if "pictures" in row]
    assert "image" in json.dumps(picture)
    assert SQLiteStorage.get_run_config("rdm", "tried")["run"] == run
