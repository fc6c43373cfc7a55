"""How good digit samples are: Frechet distances in the classifier's feature space, and legibility."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from rdm_sdk.digits import IMAGE_SIZE, digit_in_prompt
from rdm_sdk.digits.classifier import DigitClassifier, evaluation_tensors, load_classifier
from rdm_sdk.errors import DataError


class _Features(nn.Module):
    """The classifier's features of float images, as torchmetrics wants a feature extractor."""

    num_features = DigitClassifier.num_features

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over a set of images' features, from which a Frechet distance needs nothing else."""

    total: Tensor
    """Sum of the features, float64 `[64]`."""
    products: Tensor
    """Sum of their outer products, float64 `[64, 64]`."""
    count: int


def feature_statistics(images: Tensor) -> FeatureStatistics:
    """Return the feature sums of digit images `[N, 3, 32, 32]` in [0, 1]."""
    metric = _metric()
    _update(metric, images, "images", real=True)
    return FeatureStatistics(
        metric.real_features_sum, metric.real_features_cov_sum, int(metric.real_features_num_samples)
    )


def teacher_statistics() -> FeatureStatistics:
    """Return the statistics of 10,000 samples of the embedded teacher at 40 steps without guidance.

    They are the reference of FID-SD; `benchmarks/digits_teacher.py` makes them.
    """
    stored = evaluation_tensors()
    return FeatureStatistics(
        stored["teacher_feature_total"], stored["teacher_feature_products"], int(stored["teacher_feature_count"])
    )


@torch.no_grad()
def frechet_distance(images: Tensor, reference: Tensor | FeatureStatistics) -> float:
    """Return the Frechet distance of digit images `[N, 3, 32, 32]` in [0, 1] from a reference set or its statistics.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) over the 64 features of the embedded classifier (arXiv
    1706.08500, with another feature extractor, so the values compare with nothing but each other). It is biased
    upwards for small sets, like every Frechet distance: compare sets of equal size, 500 images or more.

    Raises:
        DataError: a set has no more images than features, or the images have the wrong size.
    """
    metric = _metric()
    _update(metric, images, "images", real=False)
    if isinstance(reference, FeatureStatistics):
        metric.real_features_sum = reference.total.double()
        metric.real_features_cov_sum = reference.products.double()
        metric.real_features_num_samples = torch.tensor(reference.count)
    else:
        _update(metric, reference, "reference", real=True)
    return float(metric.compute())


def _metric() -> FrechetInceptionDistance:
    return FrechetInceptionDistance(feature=_Features(), normalize=True, input_img_size=(3, IMAGE_SIZE, IMAGE_SIZE))


@torch.no_grad()
def _update(metric: FrechetInceptionDistance, images: Tensor, name: str, real: bool) -> None:
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or len(images) <= DigitClassifier.num_features:
        raise DataError(
            f"{name} must be more than {DigitClassifier.num_features} images of shape [3, {IMAGE_SIZE}, {IMAGE_SIZE}]; "
            f"got {list(images.shape)}"
        )
    for chunk in images.float().cpu().split(500):
        metric.update(chunk, real=real)


@torch.no_grad()
def legibility(images: Tensor, prompts: Sequence[str]) -> float:
    """Return the mean probability that the classifier gives to each image's prompted digit, in [0, 1].

    Raises:
        DataError: a prompt names no digit.
    """
    digits = [digit_in_prompt(prompt) for prompt in prompts]
    if None in digits:
        raise DataError(f"prompt {prompts[digits.index(None)]!r} names no digit, so legibility has no meaning for it")
    return load_classifier().legibility(images.float().cpu(), torch.tensor(digits)).mean().item()


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """Return how much images `[N, 3, H, W]` of the same prompt differ: the mean standard deviation of a pixel.

    A student that shows one picture per prompt has 0; compare with its teacher's.

    Raises:
        DataError: a prompt has one image only.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    lonely = next((prompt for prompt, places in rows.items() if len(places) < 2), None)
    if lonely is not None:
        raise DataError(f"diversity compares images of the same prompt, and {lonely!r} has one; give two or more each")
    return torch.stack([images[places].float().std(0).mean() for places in rows.values()]).mean().item()


def teacher_steps_worth(distance: float, teacher: Mapping[int, float]) -> str:
    """Return how many steps the teacher takes to come as near as a distance, such as "13", "below 1" or "40 or more".

    Args:
        distance: a student's Frechet distance.
        teacher: the teacher's own distances by its number of steps, on the same grid and from as many images. Between
            two of them, the logarithm of the steps is interpolated.
    """
    curve = sorted(teacher.items())
    if distance > curve[0][1]:
        return f"below {curve[0][0]}"
    for (fewer, worse), (more, better) in pairwise(curve):
        if worse >= distance > better:
            share = (worse - distance) / (worse - better)
            return f"{math.exp((1 - share) * math.log(fewer) + share * math.log(more)):.2g}"
    return f"{curve[-1][0]} or more"
