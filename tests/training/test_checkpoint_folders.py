"""Checkpoints are whole or are none: whatever is changed, cut off, missing or half-written is seen and skipped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState

from rdm_sdk import CheckpointError, ConfigError, RDMTrainer
from rdm_sdk.training import checkpoint_folders
from rdm_sdk.training.run_keeper import LOCK

Make = Callable[..., RDMTrainer]
SAVING = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def run(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run with checkpoints 1 and 2; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=2, **SAVING).train()
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's folder."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def files_of(folder: Path) -> list[str]:
    """Return the files below a folder, by their path in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, at: float) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "first bit": lambda path, other: flip(path, 0.0),
    "a bit in the middle": lambda path, other: flip(path, 0.5),
    "last bit": lambda path, other: flip(path, 1.0),
    "cut off": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
    "of another step": lambda path, other: shutil.copyfile(other, path),
}


def test_one_run_at_a_time_trains_in_a_folder(make_trainer: Make, tmp_path: Path) -> None:
    """Another is refused before it clears away what the first is writing, until that has ended or failed."""

    class Look(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            with pytest.raises(Timeout):
                FileLock(tmp_path / LOCK, blocking=False).acquire()
            raise InterruptedError

    writing = tmp_path / ".writing-1"
    writing.mkdir()
    with FileLock(tmp_path / LOCK), pytest.raises(ConfigError, match=r"another run is training.*folder of its own"):
        make_trainer(tmp_path, max_steps=1).train()
    assert writing.exists()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, max_steps=1, callbacks=[Look()]).train()
    make_trainer(tmp_path, max_steps=1).train()
    assert not writing.exists()


def test_every_damage_to_every_file_is_seen(copied: Path) -> None:
    """The latest whole checkpoint is then the one before, and the reason names the folder."""
    newest, before = copied / "checkpoint-2", copied / "checkpoint-1"
    assert checkpoint_folders.newest_whole(copied) == (newest, [])
    names = files_of(newest)
    assert {
        "rng_state.pth",
        "optimizer.pt",
        "critic_optimizer.pt",
        "trainer_state.json",
        checkpoint_folders.MANIFEST,
    } <= {*names}
    unseen = []
    for name in names:
        good = (newest / name).read_bytes()
        for damage, apply in DAMAGES.items():
            apply(newest / name, before / name)
            if (newest / name).exists() and (newest / name).read_bytes() == good:
                continue  # the same in both steps, such as the scheduler's settings
            found, skipped = checkpoint_folders.newest_whole(copied)
            if found != before or "checkpoint-2" not in skipped[0]:
                unseen.append((name, damage))
            (newest / name).write_bytes(good)
    assert unseen == []
    assert checkpoint_folders.newest_whole(copied) == (newest, [])


def test_no_bit_of_a_manifest_goes_unnoticed(copied: Path) -> None:
    """Not even of the run's id or of a space, which no file's hash depends on."""
    manifest = copied / "checkpoint-2" / checkpoint_folders.MANIFEST
    good = manifest.read_bytes()
    assert checkpoint_folders.read_manifest(manifest.parent).step == 2
    for place in range(len(good)):
        manifest.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="checkpoint-2"):
            checkpoint_folders.read_manifest(manifest.parent)


def test_the_newest_whole_checkpoint_is_taken(
    make_trainer: Make, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half-written and renamed folders are skipped, and the run says why; leftovers of a killed writer go."""
    flip(copied / "checkpoint-2" / "optimizer.pt", 0.5)
    (copied / "checkpoint-8").mkdir()
    shutil.copytree(copied / "checkpoint-1", copied / "checkpoint-7")
    (copied / ".writing-3" / "checkpoint-3").mkdir(parents=True)
    resumed = make_trainer(copied, max_steps=3, **SAVING)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    said = " ".join(caplog.messages)
    assert "checkpoint-8' : it has no rdm_manifest.json".replace("' :", "':") in said
    assert "checkpoint-7': it was written as checkpoint-1" in said
    assert "checkpoint-2': optimizer.pt changed" in said
    assert "going on from" in said
    assert not list(copied.glob(".*"))
    assert checkpoint_folders.newest_whole(copied)[0] == copied / "checkpoint-3"
    checkpoint_folders.verify(copied / "checkpoint-2")  # written anew in the place of the damaged one


@pytest.mark.usefixtures("no_training")
def test_without_a_whole_checkpoint_nothing_is_begun_anew(make_trainer: Make, copied: Path) -> None:
    """All are damaged: starting afresh would write over what may be mended."""
    for name in ("checkpoint-1", "checkpoint-2"):
        (copied / name / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is whole: .*scheduler\.pt missing.*scheduler\.pt missing"):
        make_trainer(copied, **SAVING).train(resume_from_checkpoint=True)


def test_an_output_folder_is_no_checkpoint(run: Path) -> None:
    """Nothing was interrupted in it: the user has named the folder above."""
    with pytest.raises(
        CheckpointError, match=r"has some in it\. Give one of them, such as '.*checkpoint-2', or 'latest'"
    ):
        checkpoint_folders.verify(run)


def test_the_latest_of_none_is_a_new_run(make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that always asks for the latest can begin; the setting of the config counts as the argument does."""
    trainer = make_trainer(tmp_path / "new", max_steps=1, resume_from_checkpoint="latest", **SAVING)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "no checkpoint in" in caplog.text


@pytest.mark.usefixtures("no_training")
def test_a_new_run_does_not_mix_with_an_older_one(make_trainer: Make, copied: Path) -> None:
    """Neither by beginning in its folder, nor by going on there from a checkpoint of a third run."""
    with pytest.raises(CheckpointError, match=r"another run \(checkpoint-2, checkpoint-1\).*another output_dir"):
        make_trainer(copied, **SAVING).train()


def test_a_second_training_in_one_trainer_is_another_run(make_trainer: Make, tmp_path: Path) -> None:
    """It would begin at step 0 beside checkpoints of later steps, from which a resumed run then went on."""
    trainer = make_trainer(tmp_path, max_steps=1, **SAVING)
    trainer.train()
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"another run \(checkpoint-1\)\. Go on with it"):
        trainer.train()
    assert files_of(tmp_path) == before


def test_a_run_that_saves_nothing_may_share_a_folder(make_trainer: Make, copied: Path) -> None:
    """It writes no checkpoint, so nothing is mixed."""
    make_trainer(copied, max_steps=1, ema_decay=0.9).train()
    assert files_of(copied / "checkpoint-2")


def test_a_finished_run_is_not_trained_further(make_trainer: Make, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming the last step's checkpoint puts it in place and takes no step."""
    trainer = make_trainer(run, max_steps=2, **SAVING)
    monkeypatch.setattr(trainer, "training_step", lambda *_: pytest.fail("it trains"))
    before = [p.detach().clone() for p in trainer.parameters_of("student")]
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters_of("student"), strict=True))


def test_the_oldest_go_and_the_newest_stays(make_trainer: Make, tmp_path: Path) -> None:
    """`save_total_limit` counts whole checkpoints of this run."""
    (tmp_path / "checkpoint-9").mkdir()
    make_trainer(tmp_path, max_steps=3, save_total_limit=2, **SAVING).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-9",
    ]


def written(output_dir: Path, **orders: int) -> None:
    """Write manifests alone, of a run "one": of which step, and as the how manieth; 0 is none."""
    for name, order in orders.items():
        step = int(name.removeprefix("step"))
        folder = output_dir / f"checkpoint-{step}"
        folder.mkdir()
        if order:
            text = checkpoint_folders.Manifest("one", step, {}, order).text()
            (folder / checkpoint_folders.MANIFEST).write_text(text)


def test_all_that_is_too_many_goes_though_more_is_kept(tmp_path: Path) -> None:
    """The best and the newest are two where one may stay, and no other stays for that."""
    written(tmp_path, step1=1, step2=2, step3=3, step4=4, step5=5)
    checkpoint_folders.rotate(tmp_path, "one", 1, ["checkpoint-1"])
    assert [path.name for path in checkpoint_folders.newest_first(tmp_path)] == ["checkpoint-5", "checkpoint-1"]


def test_a_damaged_one_counts_as_written_after_all_of_lower_steps(tmp_path: Path) -> None:
    """Among them one that a run which was taken back wrote after those of higher steps."""
    written(tmp_path, step1=1, step2=4, step3=3, step10=0)
    assert list(map(checkpoint_folders.step_of, checkpoint_folders.newest_first(tmp_path))) == [10, 2, 3, 1]


@pytest.mark.parametrize("limit", [0, -1])
def test_no_checkpoint_goes_without_a_limit(copied: Path, limit: int) -> None:
    """Transformers takes 0 and less for none, and so do its users."""
    run = checkpoint_folders.read_manifest(copied / "checkpoint-1").run
    checkpoint_folders.rotate(copied, run, limit, [])
    assert len(checkpoint_folders.checkpoints_in(copied)) == 2


def test_what_was_just_written_stays_when_a_run_was_taken_back(make_trainer: Make, tmp_path: Path) -> None:
    """It is not the newest by its number then, and would be among the oldest of those that are too many."""
    make_trainer(tmp_path, max_steps=4, **SAVING).train()
    back = make_trainer(tmp_path, max_steps=4, save_total_limit=2, **SAVING)

    class Stop(TrainerCallback):
        def on_save(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
            control.should_training_stop = True

    back.add_callback(Stop())
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_latest_of_a_run_that_was_taken_back_is_what_it_wrote_last(make_trainer: Make, tmp_path: Path) -> None:
    """Not what it wrote before, of a later step: that is what the user did not want."""
    make_trainer(tmp_path, max_steps=3, **SAVING).train()

    class Kill(TrainerCallback):
        def on_step_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    back = make_trainer(tmp_path, max_steps=3, learning_rate=1e-5, callbacks=[Kill()], **SAVING)
    with pytest.raises(KeyboardInterrupt):
        back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoint_folders.newest_first(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-1",
    ]
    again = make_trainer(tmp_path, max_steps=3, learning_rate=1e-5, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert [row["learning_rate"] for row in again.state.log_history if row["step"] == 3 and "loss" in row] == [
        pytest.approx(1e-5 / 3**2)
    ]


def test_checkpoints_of_a_version_that_did_not_count_are_in_the_order_of_their_steps(copied: Path) -> None:
    """They are as intact as others, and come before those that were counted."""
    for step in (1, 2):
        path = copied / f"checkpoint-{step}" / checkpoint_folders.MANIFEST
        content = json.loads(path.read_text())
        del content["digest"], content["written"]
        path.write_text(checkpoint_folders._with_digest(content))
    assert checkpoint_folders.newest_whole(copied) == (copied / "checkpoint-2", [])


def test_the_best_is_named_where_it_stands(make_trainer: Make, tmp_path: Path) -> None:
    """Its path in Trainer's state is the one that the checkpoint has in the end."""
    trainer = make_trainer(
        tmp_path,
        "dm + 0*legibility",
        max_steps=2,
        eval_dataset=["zero"],
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        **SAVING,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best in {str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")}
    assert f'"best_model_checkpoint": "{best}"' in (Path(best) / "trainer_state.json").read_text()


def test_a_failed_write_leaves_what_stood(make_trainer: Make, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the error says what to do, and the newest whole checkpoint is the one before."""
    trainer = make_trainer(copied, max_steps=4, **SAVING)
    kept = {name: (copied / "checkpoint-2" / name).read_bytes() for name in files_of(copied / "checkpoint-2")}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 could not be written.*No space left.*make room"):
        trainer.train(resume_from_checkpoint=True)
    assert checkpoint_folders.newest_whole(copied) == (copied / "checkpoint-2", [])
    assert not list(copied.glob(".*"))
    assert all((copied / "checkpoint-2" / name).read_bytes() == content for name, content in kept.items())
