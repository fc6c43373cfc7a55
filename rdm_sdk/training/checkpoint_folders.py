"""Checkpoint folders: written whole or not at all, verified before they are used, found again after a crash.

A checkpoint is written into a hidden folder beside its place, every file is hashed into `rdm_manifest.json` and flushed
to the disk, and the folder gets its name by one rename. What has a name and no valid manifest is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainingArguments

from rdm_sdk.errors import CheckpointError
from rdm_sdk.files import sha256_of

MANIFEST = "rdm_manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGED, _REPLACED = ".writing-", ".replaced-"


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint holds."""

    run: str
    """The run that wrote it."""
    step: int
    """Its optimizer step."""
    files: dict[str, str]
    """Path below the folder, with slashes, to the SHA-256 of the file's bytes, in hexadecimal."""
    written: int = 0
    """How many checkpoints the output folder had seen with it: one that a run wrote after it was taken back to an
    earlier one has a lower step than older ones. 0 is of a version that did not count."""

    def text(self) -> str:
        """Return the file's content, which ends in a hash of itself, so that no bit of it goes unnoticed."""
        return _with_digest(asdict(self))


def _with_digest(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True)


def step_of(folder: Path) -> int:
    """Return N of a folder named checkpoint-N, -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N, whole or not, the highest N first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_first(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N in the order in which they were written, the last one first.

    One without an intact manifest, which says nothing of that, counts as written after those of lower N.
    """
    seen, found = 0, []
    for folder in reversed(checkpoints_in(output_dir)):
        manifest = _manifest_or_none(folder)
        written = seen if manifest is None else manifest.written
        seen = max(seen, written)
        found.append((written, step_of(folder), folder))
    return [folder for *_, folder in sorted(found, reverse=True)]


# ---- Writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing(output_dir: Path, step: int, run: str, writer: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Give the folder to write `checkpoint-N` into; it takes its place in the output folder when the block has ended.

    All processes write into it; the `writer` alone seals and names it. `step` is N, and `wait` returns when all
    processes have called it.

    Raises:
        CheckpointError: something could not be written; what stood in the output folder stands.
    """
    staged = output_dir / f"{_STAGED}{step}"
    name = f"checkpoint-{step}"
    if writer:
        shutil.rmtree(staged, ignore_errors=True)
    wait()
    try:
        yield staged
        wait()
        if writer:
            _seal(staged / name, run, step, 1 + _last_written(output_dir))
            _publish(staged / name, output_dir / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{name} could not be written to {str(output_dir)!r} ({type(error).__name__}: {error}). Earlier "
            "checkpoints are whole; make room, and go on with train(resume_from_checkpoint=True)"
        ) from error
    finally:
        if writer:
            shutil.rmtree(staged, ignore_errors=True)
    wait()


def _last_written(output_dir: Path) -> int:
    manifests = map(_manifest_or_none, checkpoints_in(output_dir))
    return max((manifest.written for manifest in manifests if manifest), default=0)


def _seal(folder: Path, run: str, step: int, written: int) -> None:
    """Write the manifest of a finished folder, and make sure that every file of it has reached the disk."""
    files = {}
    for path in _files(folder):
        files[path.relative_to(folder).as_posix()] = sha256_of(path)
        _flush(path)
    (folder / MANIFEST).write_text(Manifest(run, step, files, written).text(), encoding="utf-8")
    _flush(folder / MANIFEST)
    for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush(directory)


def _publish(folder: Path, target: Path) -> None:
    """Give a sealed folder its name; an older one of that name goes only after the new one stands."""
    replaced = target.with_name(_REPLACED + target.name)
    if target.exists():
        target.replace(replaced)
    folder.replace(target)
    _flush(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def newest_kept(args: TrainingArguments) -> Iterator[None]:
    """Keep Trainer, within the block, from removing all but the best checkpoint where one may stay (`rotate` limits).

    Without the newest, a run could not go on.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


def clean(output_dir: Path) -> None:
    """Remove what interrupted writers left, and put back a checkpoint whose successor never got its name."""
    for left in output_dir.glob(f"{_STAGED}*"):
        shutil.rmtree(left)
    for replaced in output_dir.glob(f"{_REPLACED}*"):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.replace(target)


def rotate(output_dir: Path, run: str, limit: int | None, keep: Sequence[str | None]) -> None:
    """Remove a run's oldest checkpoints beyond `limit`, but for those to `keep` and the newest.

    `keep` holds paths or names. The one just written is to be among them. None, 0 and less are no limit, as for
    transformers.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(path).name for path in keep if path}
    mine = [path for path in newest_first(output_dir) if (found := _manifest_or_none(path)) and found.run == run]
    others = [path for path in mine[1:] if path.name not in kept]
    spare = len(mine) - max(limit, len(mine) - len(others))
    for path in reversed(others[len(others) - spare :] if spare > 0 else []):
        # Its name goes first: a half-removed folder must not look like a checkpoint.
        doomed = path.with_name(f"{_STAGED}removed-{path.name}")
        path.replace(doomed)
        shutil.rmtree(doomed)


# ---- Reading --------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint after hashing every file of it.

    Raises:
        CheckpointError: a file is missing, was changed, or does not belong here.
    """
    manifest = read_manifest(folder)
    if step_of(folder) >= 0 and step_of(folder) != manifest.step:
        raise _damaged(folder, f"it was written as checkpoint-{manifest.step}")
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    missing = sorted(manifest.files.keys() - found.keys())
    if missing:
        raise _damaged(folder, f"{', '.join(missing)} missing")
    try:
        changed = [name for name, digest in manifest.files.items() if sha256_of(found[name]) != digest]
    except OSError as error:
        raise _damaged(folder, f"it cannot be read ({error})") from error
    if changed:
        raise _damaged(folder, f"{', '.join(sorted(changed))} changed since it was written")
    return manifest


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of an output folder, if any, and why newer ones were skipped."""
    skipped = []
    for folder in newest_first(output_dir):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def of_other_runs(output_dir: Path, run: str | None) -> list[str]:
    """Return the names of the whole checkpoints of an output folder that are not this run's, the newest first.

    None is a run that has none yet.
    """
    return [p.name for p in checkpoints_in(output_dir) if (found := _manifest_or_none(p)) and found.run != run]


def refuse_other_runs(output_dir: Path, run: str | None) -> None:
    """Raise unless all whole checkpoints of an output folder are this run's.

    Raises:
        CheckpointError: there are others, which this run would mix with its own.
    """
    others = of_other_runs(output_dir, run)
    if others:
        raise CheckpointError(
            f"{str(output_dir)!r} holds checkpoints of another run ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}). Go on with it (resume_from_checkpoint=True; on the command line, "
            "--resume_from_checkpoint latest), or give this run another output_dir, or move them away"
        )


def is_of_run(folder: Path, run: str) -> bool:
    """Return whether a folder is a checkpoint of a run, by its manifest alone."""
    manifest = _manifest_or_none(folder)
    return manifest is not None and manifest.run == run


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest, without looking at the files that it names.

    Raises:
        CheckpointError: the folder has none that is intact, so it is no whole checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"cannot resume: there is no folder {str(folder)!r}")
    path = folder / MANIFEST
    if not path.is_file() and (found := newest_first(folder)):
        raise CheckpointError(
            f"cannot resume from {str(folder)!r}: it is no checkpoint, and has some in it. Give one of them, such as "
            f"{str(found[0])!r}, or 'latest' with that folder as output_dir"
        )
    if not path.is_file():
        raise _damaged(
            folder, f"it has no {MANIFEST}, so its writing was interrupted, or it is no checkpoint of this SDK"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        del content["digest"]
        manifest = Manifest(**content)
        intact = _with_digest(content) == text
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if not intact:
        raise _damaged(folder, f"{MANIFEST} changed since it was written")
    return manifest


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"cannot resume from {str(folder)!r}: {what}. Use an earlier checkpoint")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
