"""Every figure of one set of images against another, from their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rdm_sdk.evaluation.distances import frechet_interval, kernel_distance
from rdm_sdk.evaluation.neighbors import density_coverage, precision_recall

FEWEST = 16
"""Images from which distances and neighbors begin to mean anything."""


@dataclass(frozen=True)
class FeatureSet:
    """A set of images, by its features."""

    features: Tensor
    """`[N, D]`."""
    groups: list[int] | None
    """The number of each image's prompt; None where all were drawn from one distribution."""


def compare(images: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    """Return all figures of images against a reference.

    Raises:
        DataError: they cannot be compared.
    """
    ours, theirs = images.features, reference.features
    distance = frechet_interval(ours, theirs, images.groups, reference.groups)
    kernel = kernel_distance(ours, theirs, subset_size=min(500, len(ours) // 2, len(theirs) // 2))
    precision, recall = precision_recall(ours, theirs)
    density, coverage = density_coverage(ours, theirs)
    return {
        "frechet": distance.value,
        "low": distance.low,
        "high": distance.high,
        "kernel": kernel.mean,
        "kernel_deviation": kernel.deviation,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def remark_on_bias(*sets: Tensor) -> list[str]:
    """Return a remark if one of some sets of features `[N, D]` has no more images than features."""
    fewest, width = min(map(len, sets)), sets[0].shape[1]
    if fewest > width:
        return []
    return [
        f"{fewest} images are no more than the {width} features, so Frechet distances are mostly their bias; look at "
        "the kernel distances"
    ]
