"""How good digit samples are: Frechet distances in the classifier's feature space, and legibility."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdm_sdk.digits import IMAGE_SIZE, digit_in_prompt
from rdm_sdk.digits.classifier import DigitClassifier, evaluation_tensors, load_classifier
from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.distances import FeatureStatistics, frechet
from rdm_sdk.evaluation.images import check_images, check_prompts

BATCH = 500
"""Images whose features are computed at a time."""


@torch.no_grad()
def digit_features(images: Tensor) -> Tensor:
    """Return the embedded classifier's features `[N, 64]` of digit images `[N, 3, 32, 32]` in [0, 1].

    Raises:
        DataError: the images have another size, or are no RGB images in [0, 1].
    """
    return _features(images, "images")


def feature_statistics(images: Tensor) -> FeatureStatistics:
    """Return the feature sums of digit images `[N, 3, 32, 32]` in [0, 1], of more than 64."""
    return _statistics(images, "images")


def teacher_statistics() -> FeatureStatistics:
    """Return the statistics of 10,000 samples of the embedded teacher at 40 steps without guidance.

    They are the reference of FID-SD; `benchmarks/digits_teacher.py` makes them.
    """
    stored = evaluation_tensors()
    return FeatureStatistics(
        stored["teacher_feature_total"], stored["teacher_feature_products"], int(stored["teacher_feature_count"])
    )


def frechet_distance(images: Tensor, reference: Tensor | FeatureStatistics) -> float:
    """Return the Frechet distance of digit images `[N, 3, 32, 32]` in [0, 1] from a reference set or its statistics.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) over the 64 features of the embedded classifier (arXiv
    1706.08500, with another feature extractor, so the values compare with nothing but each other). It is biased
    upwards for small sets, like every Frechet distance: compare sets of equal size, 500 images or more.

    Raises:
        DataError: a set holds no more images than features, or what is no RGB image of the digits' size in [0, 1].
    """
    theirs = reference if isinstance(reference, FeatureStatistics) else _statistics(reference, "reference")
    return frechet(_statistics(images, "images"), theirs)


def _statistics(images: Tensor, name: str) -> FeatureStatistics:
    features = _features(images, name)
    if len(features) <= DigitClassifier.num_features:
        raise DataError(f"{name} must be more than {DigitClassifier.num_features} images; got {len(features)}")
    return FeatureStatistics.of(features)


@torch.no_grad()
def _features(images: Tensor, name: str) -> Tensor:
    if check_images(images, name).shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise DataError(f"{name} must be digits of shape [3, {IMAGE_SIZE}, {IMAGE_SIZE}]; got {list(images.shape[1:])}")
    classifier = load_classifier()
    return torch.cat([classifier.features(chunk) for chunk in images.float().cpu().split(BATCH)])


@torch.no_grad()
def legibility(images: Tensor, prompts: Sequence[str]) -> float:
    """Return the mean probability that the classifier gives to each image's prompted digit, in [0, 1].

    Raises:
        DataError: a prompt names no digit, or there is not one prompt per image.
    """
    check_prompts(check_images(images), prompts)
    digits = [digit_in_prompt(prompt) for prompt in prompts]
    if None in digits:
        raise DataError(f"prompt {prompts[digits.index(None)]!r} names no digit, so legibility has no meaning for it")
    return load_classifier().legibility(images.float().cpu(), torch.tensor(digits)).mean().item()
