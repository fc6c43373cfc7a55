"""Distances between two sets of images, from their features: Frechet and kernel.

N images have features `[N, D]` of any extractor; figures of different extractors do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.images import check_features, check_same_width
from rdm_sdk.evaluation.intervals import CONFIDENCE, Interval, mean_variance, normal_interval


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over a set of images' features, from which a Frechet distance needs nothing else."""

    total: Tensor
    """Sum of the features, float64 `[D]`."""
    products: Tensor
    """Sum of their outer products, float64 `[D, D]`."""
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of features `[N, D]`.

        Raises:
            DataError: they are no finite matrix of two rows or more.
        """
        matrix = check_features(features)
        return cls(matrix.sum(0), matrix.T @ matrix, len(matrix))

    @property
    def mean(self) -> Tensor:
        """The mean `[D]`."""
        return self.total.double() / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance `[D, D]`."""
        mean = self.mean
        return (self.products.double() - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Return |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), Heusel et al. 2017 (arXiv 1706.08500), equation 6.

    It is biased upwards for small sets (by about 1/N): compare sets of equal size.

    Raises:
        DataError: the widths differ, or the statistics are not finite.
    """
    _check_pair(one, other)
    covariances = one.covariance, other.covariance
    root = _root(covariances[1])
    # (S_1 S_2)^(1/2) has the eigenvalues of (R S_1 R)^(1/2), R = S_2^(1/2), which is symmetric and so never complex.
    shared = torch.linalg.eigvalsh(root @ covariances[0] @ root).clamp_min(0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * shared
    return float((one.mean - other.mean).square().sum() + spread)


def frechet_interval(
    features: Tensor,
    reference: Tensor | FeatureStatistics,
    groups: Sequence[int] | None = None,
    reference_groups: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the Frechet distance of features `[N, D]` from a reference, with an interval by the delta method.

    The distance is a smooth function of the two empirical distributions, so its deviation is that of its influence
    function, (2 (m_1 - m_2) + (I - T) (x - m_1)) . (x - m_1) for an image x of the first set with the transport map
    T = R (R S_1 R)^(-1/2) R, and the same the other way round for the reference, whose share is 0 if only its
    statistics are given. (A bootstrap would not do: images that are drawn twice raise the distance.) The interval is
    about the figure of N images: it holds the noise of the images that were drawn, and not the bias of small sets.

    Args:
        features: of the images.
        reference: features of others, or their statistics.
        groups: the group of each image, such as the number of its prompt, where as many images of every prompt are
            drawn: what differs between prompts is then no noise. None where all are drawn from one distribution.
        reference_groups: the same of the reference.
        confidence: of the interval.

    Raises:
        DataError: as `frechet`.
    """
    ours = check_features(features)
    one = FeatureStatistics.of(ours)
    other = FeatureStatistics.of(reference) if isinstance(reference, Tensor) else reference
    value = frechet(one, other)
    variance = mean_variance(_influence(ours, one, other), groups)
    if isinstance(reference, Tensor):
        variance += mean_variance(_influence(check_features(reference), other, one), reference_groups)
    return normal_interval(value, variance**0.5, confidence)


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance, as a mean over subsets."""

    mean: float
    deviation: float
    """Standard deviation over the subsets."""


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int = 50, subset_size: int = 500, seed: int = 0
) -> KernelDistance:
    """Return the kernel inception distance, Binkowski et al. 2018 (arXiv 1801.01401).

    The unbiased squared maximum mean discrepancy under (x . y / D + 1)^3, over random subsets of both sets that a
    seed determines. Unlike the Frechet distance it is not biased by the number of images.

    Raises:
        DataError: features that cannot be compared, or fewer of them than a subset takes.
    """
    sets = check_features(features), check_features(reference, "reference features")
    check_same_width(*sets)
    if not 2 <= subset_size <= min(map(len, sets)):
        raise DataError(
            f"subset_size={subset_size} must be from 2 to the number of images, {len(sets[0])} against {len(sets[1])}"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        ours, theirs = (rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in sets)
        values.append(poly_mmd(theirs, ours, degree=3, gamma=None, coef=1.0))
    found = torch.stack(values)
    return KernelDistance(float(found.mean()), float(found.std()) if subsets > 1 else 0.0)


def _check_pair(one: FeatureStatistics, other: FeatureStatistics) -> None:
    check_same_width(one.products, other.products)
    for side in (one, other):
        if side.count < 2 or not bool(side.total.isfinite().all() and side.products.isfinite().all()):
            raise DataError(f"statistics must be finite and of two images or more; got those of {side.count}")


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def _influence(features: Tensor, mine: FeatureStatistics, other: FeatureStatistics) -> Tensor:
    """Return how each image of a set moves the Frechet distance, up to a constant, `[N]`."""
    root = _root(other.covariance)
    values, vectors = torch.linalg.eigh(root @ mine.covariance @ root)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    transport = root @ (vectors * inverse @ vectors.T) @ root
    deviation = features - mine.mean
    push = 2 * (mine.mean - other.mean) + deviation - deviation @ transport
    influence: Tensor = (push * deviation).sum(1)
    return influence
