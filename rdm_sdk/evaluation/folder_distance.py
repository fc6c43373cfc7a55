"""Distances between two folders of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.comparison import FEWEST, FeatureSet, compare, remark_on_bias
from rdm_sdk.evaluation.features import Extractor, Features, feature_extractor
from rdm_sdk.evaluation.folder import picture_batches, picture_files
from rdm_sdk.evaluation.result import distance_table
from rdm_sdk.files import replacing
from rdm_sdk.training.run_record import versions


@dataclass(frozen=True)
class FolderDistance:
    """How far the pictures of a folder are from those of another."""

    figures: dict[str, Any]
    """frechet with low and high, kernel with its deviation, precision, recall, density, coverage."""
    notes: list[str]
    """What to know before believing them."""
    provenance: dict[str, Any]
    """Versions, features, folders and their numbers of pictures."""

    def table(self) -> str:
        """Return the figures as a Markdown table, with 95 % intervals where there are any."""
        return distance_table(self.figures)

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        with replacing(Path(path)) as staged:
            staged.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        return Path(path)


def folder_distance(
    folder: str | Path,
    reference: str | Path,
    features: str | Features,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FolderDistance:
    """Return how far the pictures (PNG, JPEG, WebP) of a folder are from those of another, and in the folders in them.

    Args:
        folder: what is judged. Pictures may differ in size, as far as the features take them.
        reference: real pictures, or another model's.
        features: as `evaluate`'s.
        device: where the network of the features works; by default a GPU, if there is one.
        progress: show bars.

    Raises:
        DataError: a folder holds fewer than 16 pictures, or one that cannot be read, or is a part of the other.
        ConfigError, RewardError: the features cannot be had.
    """
    places = [Path(place).resolve() for place in (folder, reference)]
    if places[0] == places[1] or places[0] in places[1].parents or places[1] in places[0].parents:
        raise DataError(
            f"{str(folder)!r} and {str(reference)!r} hold the same pictures; give two folders, neither in the other"
        )
    files = {str(place): picture_files(Path(place)) for place in (folder, reference)}
    for name, found in files.items():
        if len(found) < FEWEST:
            raise DataError(
                f"{name!r} must hold at least {FEWEST} pictures, for distances to mean anything; got {len(found)}"
            )
    extractor = feature_extractor(features, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ours, theirs = (_features(found, extractor, name, progress) for name, found in files.items())
    counts = {name: len(found) for name, found in files.items()}
    return FolderDistance(
        compare(FeatureSet(ours, None), FeatureSet(theirs, None)),
        remark_on_bias(ours, theirs),
        {
            "versions": versions(),
            "features": extractor.name,
            "folder": str(folder),
            "reference": str(reference),
            "pictures": counts,
        },
    )


def _features(files: list[Path], extractor: Extractor, name: str, progress: bool) -> torch.Tensor:
    with tqdm(total=len(files), desc=f"features of {name}", unit="image", disable=not progress) as bar:
        return torch.cat([extractor(images, bar.update) for images in picture_batches(files)])
