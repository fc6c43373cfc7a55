"""Fidelity and variety in two figures each, from nearest neighbors in a feature space `[N, D]`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.images import check_features, check_same_width

ROWS = 1000
"""Rows of a matrix of distances that are in memory at a time."""


def precision_recall(features: Tensor, reference: Tensor, *, neighbors: int = 3) -> tuple[float, float]:
    """Return improved precision and recall, both in [0, 1], Kynkaanniemi et al. 2019 (arXiv 1904.06991).

    Precision: the share of images inside the reference's manifold, the union of balls that reach from each reference
    image to its `neighbors`-th nearest reference image. Recall: the share of reference images inside that of the
    images.

    Raises:
        DataError: features that cannot be compared, or too few of them.
    """
    ours, theirs = _checked(features, reference, neighbors)
    precise = _inside(ours, theirs, _radii(theirs, neighbors)).gt(0).double().mean()
    recalled = _inside(theirs, ours, _radii(ours, neighbors)).gt(0).double().mean()
    return float(precise), float(recalled)


def density_coverage(features: Tensor, reference: Tensor, *, neighbors: int = 5) -> tuple[float, float]:
    """Return density (0 and up, 1 for the same distribution) and coverage in [0, 1], Naeem et al. 2020 (2002.09797).

    Density: in how many of the reference's balls an image lies, divided by `neighbors`, so that an outlier of the
    reference counts little. Coverage: the share of the reference's balls that hold an image.

    Raises:
        DataError: features that cannot be compared, or too few of them.
    """
    ours, theirs = _checked(features, reference, neighbors)
    radii = _radii(theirs, neighbors)
    density = _inside(ours, theirs, radii).double().mean() / neighbors
    nearest = torch.cat([distances.amin(1) for distances in _distances(theirs, ours)])
    return float(density), float((nearest <= radii).double().mean())


def _checked(features: Tensor, reference: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    if neighbors < 1:
        raise DataError(f"neighbors must be at least 1; got {neighbors}")
    ours = check_features(features, "features", neighbors + 1)
    theirs = check_features(reference, "reference features", neighbors + 1)
    check_same_width(ours, theirs)
    return ours, theirs


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield the distances of rows `[n, D]` from columns `[m, D]` in pieces `[n', m]`."""
    for piece in rows.split(ROWS):
        yield torch.cdist(piece, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, neighbors: int) -> Tensor:
    """Return each point's distance from its `neighbors`-th nearest other point, `[N]`."""
    # The point itself is the nearest: its distance is exactly 0 without the detour by a matrix product.
    return torch.cat([distances.kthvalue(neighbors + 1, dim=1).values for distances in _distances(points, points)])


def _inside(points: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    """Return in how many of the balls about `centers` each point lies, int64 `[N]`."""
    return torch.cat([(distances <= radii).sum(1) for distances in _distances(points, centers)])
