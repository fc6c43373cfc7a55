"""Figures of sets of images, against formulas written here with NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from rdm_sdk import DataError, digits, diversity, feature_statistics, frechet_distance, legibility
from rdm_sdk.evaluation.distances import FeatureStatistics, frechet, frechet_interval, kernel_distance
from rdm_sdk.evaluation.intervals import mean_interval, mean_variance
from rdm_sdk.evaluation.neighbors import density_coverage, precision_recall


def drawn(seed: int, count: int = 300, width: int = 8, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing * scale + shift


def reference_frechet(one: np.ndarray, other: np.ndarray) -> float:
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    mean = np.sum((one.mean(0) - other.mean(0)) ** 2)
    return float(mean + np.trace(first + second - 2 * sqrtm(first @ second).real))


def reference_kernel(one: np.ndarray, other: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(one), len(other)
    within = kernel(one, one), kernel(other, other)
    same = (within[0].sum() - np.trace(within[0])) / (n * (n - 1))
    same += (within[1].sum() - np.trace(within[1])) / (m * (m - 1))
    return float(same - 2 * kernel(one, other).mean())


@pytest.mark.parametrize("count", [300, 12, 6])
def test_the_frechet_distance_is_the_formula(count: int) -> None:
    """Also from fewer images than features, where a covariance is singular."""
    one, other = drawn(0, count), drawn(1, 200, shift=0.3, scale=1.2)
    expected = reference_frechet(one.double().numpy(), other.double().numpy())
    assert frechet(FeatureStatistics.of(one), FeatureStatistics.of(other)) == pytest.approx(expected, rel=1e-3)
    assert frechet_interval(one, other).value == pytest.approx(expected, rel=1e-3)


def test_the_kernel_distance_is_the_formula() -> None:
    """One subset of all images is the estimator itself; many subsets vary about it, the same for the same seed."""
    one, other = drawn(0), drawn(1, shift=0.3)
    expected = reference_kernel(one.double().numpy(), other.double().numpy())
    assert kernel_distance(one, other, subsets=1, subset_size=300).mean == pytest.approx(expected, rel=1e-3)
    several = kernel_distance(one, other, subsets=100, subset_size=100, seed=3)
    assert several.mean == pytest.approx(expected, abs=3 * several.deviation / 100**0.5)
    assert 0 < several.deviation < 20 * expected
    assert several == kernel_distance(one, other, subsets=100, subset_size=100, seed=3)
    assert several != kernel_distance(one, other, subsets=100, subset_size=100, seed=4)


def test_neighbors_are_counted_as_the_papers_do() -> None:
    """Precision, recall, density and coverage equal loops over all pairs."""
    ours, theirs = drawn(0, 60), drawn(1, 50, shift=0.5)
    a, b = ours.double().numpy(), theirs.double().numpy()

    def radii(points: np.ndarray, k: int) -> np.ndarray:
        return np.array([sorted(np.linalg.norm(points - p, axis=1))[k] for p in points])

    inside = np.array([[np.linalg.norm(x - y) for y in b] for x in a])
    precision = (inside <= radii(b, 3)[None]).any(1).mean()
    recall = (inside <= radii(a, 3)[:, None]).any(0).mean()
    assert precision_recall(ours, theirs) == pytest.approx((precision, recall))
    density = (inside <= radii(b, 5)[None]).sum(1).mean() / 5
    coverage = (inside.min(0) <= radii(b, 5)).mean()
    assert density_coverage(ours, theirs) == pytest.approx((density, coverage))
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_a_ball_holds_what_lies_on_its_edge() -> None:
    """Sets of one and the same image, whose balls have no extent, are the same sets."""
    alike = drawn(0, 1).expand(12, 8)
    assert precision_recall(alike, alike) == (1.0, 1.0)
    assert density_coverage(alike, alike) == (12 / 5, 1.0)


def test_neighbors_tell_fidelity_from_variety() -> None:
    """One good picture over and over is precise and covers nothing; noise about everything is the other way round."""
    reference = drawn(0, 400)
    narrow = reference[:1] + 0.01 * drawn(2, 400)
    wide = drawn(3, 400, scale=3)
    assert precision_recall(narrow, reference)[0] > 0.9
    assert precision_recall(narrow, reference)[1] < 0.1
    assert precision_recall(wide, reference)[0] < 0.4
    assert density_coverage(narrow, reference)[1] < 0.1 < 0.8 < density_coverage(drawn(4, 400), reference)[1]


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_intervals_of_means_cover_the_truth() -> None:
    """In 90 to 99 % of 200 simulations, of a skewed distribution too."""
    generator = torch.Generator().manual_seed(0)
    for draw, truth in ((lambda g: torch.rand(100, generator=g), 0.5), (_exponential, 1.0)):
        found = [mean_interval(draw(generator), seed=i, draws=400) for i in range(200)]
        assert 0.90 <= covered([(one.low, one.high) for one in found], truth) <= 0.99


def test_what_differs_between_prompts_is_no_noise() -> None:
    """Groups of two with means of their own: intervals still cover the truth, and are far narrower."""
    generator = torch.Generator().manual_seed(5)
    offsets = torch.linspace(-10, 10, 60).repeat_interleave(2)
    groups = [row // 2 for row in range(120)]
    found, ignorant, frechets = [], [], []
    for i in range(200):
        values = offsets + torch.randn(120, generator=generator)
        found.append(mean_interval(values, groups, seed=i, draws=400))
        ignorant.append(mean_interval(values, seed=i, draws=400))
        one = frechet_interval(values[:, None], FeatureStatistics.of(torch.tensor([[100.0], [120.0]])), groups)
        frechets.append((one.low, one.high, one.value))
    assert 0.90 <= covered([(one.low, one.high) for one in found], 0.0) <= 0.99
    assert found[0].high - found[0].low < 0.3 * (ignorant[0].high - ignorant[0].low)
    middle = float(np.mean([value for *_, value in frechets]))
    assert 0.90 <= covered([(low, high) for low, high, _ in frechets], middle) <= 0.99


def test_the_interval_of_a_distance_is_the_same_from_both_sides() -> None:
    """It is as far from one set to the other as back, with each set's noise, and what is none within its own groups."""
    one, other = drawn(0, 120, shift=2.0), drawn(1, 160, scale=1.5)
    of_one, of_other = [row % 3 for row in range(120)], [row // 80 for row in range(160)]
    one = one + 3 * torch.tensor(of_one)[:, None]
    there = frechet_interval(one, other, of_one, of_other)
    back = frechet_interval(other, one, of_other, of_one)
    assert (there.low, there.high) == pytest.approx((back.low, back.high), rel=1e-6)
    alone = frechet_interval(one, FeatureStatistics.of(other), of_one)
    assert there.high - there.low > 1.05 * (alone.high - alone.low)


def test_groups_of_one_are_one_group() -> None:
    """Nobody knows their spread, so what differs between them counts as noise; the other groups keep their means."""
    values = torch.tensor([1.0, 2.0, 4.0, 9.0, 50.0, 52.0], dtype=torch.float64)
    scatter = 4 * np.var(values[:4].numpy(), ddof=1) + 2 * np.var([50, 52], ddof=1)
    assert mean_variance(values, [0, 1, 2, 3, 7, 7]) == pytest.approx(scatter / 36)
    assert mean_variance(values[:4], [3, 1, 0, 2]) == pytest.approx(np.var(values[:4].numpy(), ddof=1) / 4)
    one = mean_interval(values, [0, 1, 2, 3, 7, 7], draws=4000)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * (scatter / 36) ** 0.5, rel=0.15)


def _exponential(generator: torch.Generator) -> torch.Tensor:
    return torch.empty(200).exponential_(1.0, generator=generator)


@pytest.mark.parametrize("sampled", [False, True])
def test_intervals_of_frechet_distances_cover_the_truth(sampled: bool) -> None:
    """Against a reference that is known, and one that is a sample too, whose noise then counts."""
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    big = 10**9
    exact = FeatureStatistics(torch.zeros(4).double(), mixing.T @ mixing * (big - 1), big)
    shift = torch.tensor([1.5, 0, -1, 0], dtype=torch.float64)
    truth = frechet(
        FeatureStatistics(shift * big, 1.44 * mixing.T @ mixing * (big - 1) + big * torch.outer(shift, shift), big),
        exact,
    )
    generator = torch.Generator().manual_seed(2)
    intervals = []
    for _ in range(200):
        images = 1.2 * torch.randn(800, 4, generator=generator, dtype=torch.float64) @ mixing + shift
        other = torch.randn(800, 4, generator=generator, dtype=torch.float64) @ mixing if sampled else exact
        one = frechet_interval(images, other)
        intervals.append((one.low, one.high))
    assert 0.90 <= covered(intervals, truth) <= 0.99


def test_intervals_leave_out_what_does_not_apply() -> None:
    """NaN is no score."""
    assert mean_interval([1.0, float("nan"), 3.0]).value == 2
    with pytest.raises(DataError, match="at least one value"):
        mean_interval([float("nan")])


BAD = [
    ("0 to 255", lambda x: x * 255, "divide 8-bit images by 255"),
    ("8 bits", lambda x: (x * 255).to(torch.uint8), "Divide 8-bit images by 255"),
    ("-1 to 1", lambda x: x * 2 - 1, r"map \[-1, 1\] by x / 2 \+ 0.5"),
    ("one NaN", lambda x: x.index_fill(0, torch.tensor(3), torch.nan), "1 of 70, the first of them image 3"),
    ("infinity", lambda x: x / 0.0, "NaN or infinite pixels"),
    ("channels last", lambda x: x.permute(0, 2, 3, 1), "Channels come second"),
    ("gray", lambda x: x[:, :1], r"float \[N, 3, H, W\]"),
    ("one image", lambda x: x[0], r"float \[N, 3, H, W\]"),
    ("a list", list, "got a list"),
    ("none", lambda x: x[:0], "there are none"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_images_that_are_none_are_refused(change: object, message: str) -> None:
    """In one line, before an eigen-decomposition, which a NaN would end with the whole process."""
    images = change(digits.heldout_images()[:70])  # type: ignore[operator]
    prompts = ["a handwritten seven"] * 70
    for use in (
        lambda: frechet_distance(images, digits.heldout_images()),
        lambda: frechet_distance(digits.heldout_images(), images),
        lambda: feature_statistics(images),
        lambda: legibility(images, prompts),
        lambda: diversity(images, prompts),
    ):
        with pytest.raises(DataError, match=message) as raised:
            use()
        assert "\n" not in str(raised.value)


def test_lists_of_unequal_length_are_refused() -> None:
    """One prompt per image, and a text is no list of them."""
    images = digits.heldout_images()[:8]
    for use in (legibility, diversity):
        with pytest.raises(DataError, match="8 images do not go with 7 prompts"):
            use(images, ["seven"] * 7)
        with pytest.raises(DataError, match="8 images do not go with one text"):
            use(images, "handwrit")


def test_features_that_cannot_be_compared_are_refused() -> None:
    """Wrong ranks, widths, counts and NaN are errors that say so."""
    good = drawn(0, 20)
    broken = good.clone()
    broken[2, 3] = torch.nan
    for compare in (frechet_interval, precision_recall, density_coverage):
        for bad, message in (
            (broken, "NaN or infinity"),
            (good[:, :4], "width"),
            (good[0], "a row per image"),
            (good.long(), "float matrix"),
            (good[:1], "images; got 1"),
        ):
            with pytest.raises(DataError, match=message):
                compare(bad, good)
    with pytest.raises(DataError, match="subset_size=500 must be from 2 to the number of images, 20 against 20"):
        kernel_distance(good, good)
    with pytest.raises(DataError, match="statistics must be finite"):
        frechet(FeatureStatistics(broken.sum(0), broken.T @ broken, 20), FeatureStatistics.of(good))
    with pytest.raises(DataError, match="neighbors must be at least 1"):
        precision_recall(good, good, neighbors=0)
