"""Scores of pictures on disk."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from rdm_sdk.errors import ConfigError, DataError
from rdm_sdk.evaluation.provenance import rewards_provenance
from rdm_sdk.evaluation.scoring import Piece, judges_of, scores_of, summary
from rdm_sdk.files import replacing
from rdm_sdk.rewards.images import read_images
from rdm_sdk.rewards.resolve import RewardFuncs, plan_rewards
from rdm_sdk.rewards.scoring import check_scorable
from rdm_sdk.training.prompt_files import read_prompt_file
from rdm_sdk.training.run_record import versions
from rdm_sdk.vision.references import opened, upright

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NAMES = "names"
"""In the place of a file of prompts: each file's name is its prompt."""
TOGETHER = 32
"""Pictures of one size that are read and judged at a time."""


@dataclass(frozen=True)
class FolderScores:
    """The scores of the pictures of a folder."""

    files: list[str]
    """Names of the pictures, relative to the folder, in alphabetical order."""
    prompts: list[str] | None
    scores: dict[str, list[float]]
    """By reward, one per picture; NaN where it does not apply."""
    summaries: dict[str, dict[str, Any]]
    """By reward: mean, low and high (None of a single score), deviation, images, and the best and worst prompts."""
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON, or as CSV with a column per reward, as the file's name ends.

        Raises:
            ConfigError: the name ends otherwise.
        """
        target = Path(path)
        check_target(target)
        text = self._csv() if target.suffix.lower() == ".csv" else self._json()
        with replacing(target) as staged:
            staged.write_text(text, encoding="utf-8", newline="")
        return target

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row, name in enumerate(self.files):
            prompt = {} if self.prompts is None else {"prompt": self.prompts[row]}
            values = {label: scores[row] for label, scores in self.scores.items()}
            yield {"file_name": name, **prompt, **{label: v if v == v else None for label, v in values.items()}}

    def _json(self) -> str:
        content = {"rewards": self.summaries, "images": list(self._rows()), "provenance": self.provenance}
        return json.dumps(content, indent=1) + "\n"

    def _csv(self) -> str:
        names = ["file_name", *([] if self.prompts is None else ["prompt"]), *self.scores]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows())
        return text.getvalue()


def check_target(path: Path) -> None:
    """Raise `ConfigError` unless scores can be written to a file of that name."""
    if path.suffix.lower() not in (".json", ".csv"):
        raise ConfigError(f"{str(path)!r} must end in .json or .csv, which says what is written")


def score_folder(
    folder: str | Path,
    rewards: RewardFuncs,
    prompts: str | Path | Mapping[str, str] | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FolderScores:
    """Score the pictures (PNG, JPEG, WebP) in a folder, and in the folders in it.

    Args:
        folder: the folder. Pictures may differ in size; those of one size are judged together.
        rewards: as `RDMTrainer`'s `reward_funcs`; weights mean nothing here. Each picture is judged alone.
        prompts: a CSV or JSONL file with the columns `file_name` and `prompt`, whose other columns are handed to
            rewards; "names": a picture's name is its prompt, with underscores for spaces and without a number at its
            end; or a mapping of names to prompts.
        device: where the rewards' models work; by default a GPU, if there is one.
        progress: show a bar.

    Raises:
        DataError: there are no pictures, one of them cannot be read or named in a file, or one has no prompt or two.
        RewardError: a reward is unknown, cannot judge finished images, or compares the images of a prompt.
    """
    path = Path(folder)
    found = _pictures(path)
    files = [p.relative_to(path).as_posix() for p in found]
    _check_writable(files, "the name of the picture")
    columns = _columns(prompts, files)
    texts = columns.pop("prompt", None)
    _check_writable(texts or (), "the prompt")
    planned = plan_rewards(rewards)
    check_scorable(planned, texts is not None, columns, group_size=1)
    sizes = [_size(p) for p in found]
    judges = judges_of(planned, texts is not None, columns, group_size=1)
    provenance = {"versions": versions(), "rewards": rewards_provenance(judges)}
    order = sorted(range(len(found)), key=lambda row: sizes[row])
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=len(found), desc="scoring", unit="image", disable=not progress) as bar:
        pieces = _pieces(found, order, texts, columns)
        sorted_scores = scores_of(judges, pieces, device=place, done=bar.update)
    scores = {label: torch.empty_like(v).index_copy_(0, torch.tensor(order), v) for label, v in sorted_scores.items()}
    return FolderScores(
        files,
        texts,
        {label: values.tolist() for label, values in scores.items()},
        {label: summary(values, texts) for label, values in scores.items()},
        provenance,
    )


def read_folder(folder: str | Path) -> Tensor:
    """Return the pictures of a folder as one set of images, float `[N, 3, H, W]` in [0, 1].

    Raises:
        DataError: there are none, one of them cannot be read, or their sizes differ.
    """
    images: list[Tensor] = []
    found = _pictures(Path(folder))
    for path in found:
        images.append(_read(path))
        if images[-1].shape != images[0].shape:
            ends = (found[0].name, images[0]), (path.name, images[-1])
            shown = ", ".join(f"{name}: {image.shape[1]} x {image.shape[2]}" for name, image in ends)
            raise DataError(f"the pictures in {str(folder)!r} must be of one size; got {shown}. Resize them first")
    return torch.stack(images)


def _check_writable(texts: Iterable[str], what: str) -> None:
    """Raise `DataError` for what no file in UTF-8 can hold: saving would fail once everything is scored."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{what} {text!r} cannot be saved with its scores, in UTF-8; change it") from error


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        parent = f"; it is a file: give the folder that it lies in, {str(folder.parent)!r}" if folder.is_file() else ""
        raise DataError(f"there is no folder {str(folder)!r}{parent}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"there are no pictures in {str(folder)!r}; those that end in {', '.join(SUFFIXES)} are read")
    return found


def _pieces(
    found: Sequence[Path], order: Sequence[int], texts: Sequence[str] | None, columns: Mapping[str, list[Any]]
) -> Iterator[Piece]:
    """Yield the pictures in an order, those together that follow each other and are of one size."""
    images: list[Tensor] = []
    start = 0
    for end, row in enumerate(order):
        image = _read(found[row])
        if images and (len(images) == TOGETHER or image.shape != images[0].shape):
            yield _piece(images, order[start:end], texts, columns)
            images, start = [], end
        images.append(image)
    yield _piece(images, order[start:], texts, columns)


def _piece(
    images: list[Tensor], rows: Sequence[int], texts: Sequence[str] | None, columns: Mapping[str, list[Any]]
) -> Piece:
    return Piece(
        torch.stack(images),
        None if texts is None else [texts[row] for row in rows],
        {name: [values[row] for row in rows] for name, values in columns.items()},
    )


def prompt_of(name: str) -> str:
    """Return the prompt that a picture's name stands for: "a_red_fox_0012.png" is "a red fox"."""
    return re.sub(r"[\s_]+\d+$", "", Path(name).stem).replace("_", " ").strip()


def _columns(source: str | Path | Mapping[str, str] | None, files: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of the pictures, `prompt` among them if there are prompts."""
    if source is None:
        return {}
    if source == NAMES:
        return {"prompt": [prompt_of(name) for name in files]}
    rows = (
        {name: {"prompt": prompt} for name, prompt in source.items()}
        if isinstance(source, Mapping)
        else _read_rows(Path(source).expanduser())
    )
    missing = [name for name in files if name not in rows]
    if missing:
        raise DataError(
            f"prompts: {len(missing)} of {len(files)} pictures have no line, {missing[0]!r} first; "
            "file_name is relative to the folder"
        )
    names = sorted({column for name in files for column in rows[name]})
    short = next((name for name in files if not isinstance(rows[name].get("prompt"), str)), None)
    if short is not None:
        raise DataError(f"prompts: the line of {short!r} has no prompt")
    return {column: [rows[name].get(column) for name in files] for column in names}


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by their `file_name`."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise DataError(f"prompts: {str(path)!r} must end in .csv or .jsonl, or be {NAMES!r}")
    table = read_prompt_file(path, "prompts")
    if not {"file_name", "prompt"} <= set(table.column_names):
        found = ", ".join(table.column_names)
        raise DataError(f"prompts: {str(path)!r} needs the columns file_name and prompt; it has: {found}")
    twice = next(((name, n) for name, n in Counter(table["file_name"]).items() if name is not None and n > 1), None)
    if twice is not None:
        raise DataError(f"prompts: {str(path)!r} has {twice[1]} lines for {twice[0]!r}; leave one")
    return {row.pop("file_name"): row for row in table}


def _size(path: Path) -> tuple[int, int]:
    """Return a picture's height and width as it is shown, as far as what stands before its pixels tells."""
    with opened(path, _name(path)) as picture:
        width, height = picture.size
        # A PNG's own `getexif` decodes all pixels, for the sake of what may stand behind them.
        orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _read(path: Path) -> Tensor:
    """Return a picture as RGB, float `[3, H, W]` in [0, 1], turned as its camera said."""
    return read_images([upright(path, _name(path))], _name(path), DataError)[0]


def _name(path: Path) -> str:
    return f"the picture {str(path)!r}"
