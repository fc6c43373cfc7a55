"""How good digit samples are: Frechet distances in the classifier's feature space, and legibility."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from rdm_sdk.digits import IMAGE_SIZE, digit_in_prompt
from rdm_sdk.digits.classifier import DigitClassifier, load_classifier
from rdm_sdk.errors import DataError


class _Features(nn.Module):
    """The classifier's features of float images, as torchmetrics wants a feature extractor."""

    num_features = DigitClassifier.num_features

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


@torch.no_grad()
def frechet_distance(images: Tensor, reference: Tensor) -> float:
    """Return the Frechet distance between two sets of digit images, `[N, 3, 32, 32]` and `[M, 3, 32, 32]` in [0, 1].

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) over the 64 features of the embedded classifier (arXiv
    1706.08500, with another feature extractor, so the values compare with nothing but each other). It is biased
    upwards for small sets, like every Frechet distance: compare sets of equal size, 500 images or more.

    Raises:
        DataError: a set has fewer images than features, or the images have the wrong size.
    """
    for name, batch in (("images", images), ("reference", reference)):
        if batch.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or len(batch) <= DigitClassifier.num_features:
            raise DataError(
                f"{name} must be more than {DigitClassifier.num_features} images of shape [3, {IMAGE_SIZE}, "
                f"{IMAGE_SIZE}]; got {list(batch.shape)}"
            )
    size = (3, IMAGE_SIZE, IMAGE_SIZE)
    metric = FrechetInceptionDistance(feature=_Features(), normalize=True, input_img_size=size)
    for batch, real in ((images, False), (reference, True)):
        for chunk in batch.float().cpu().split(500):
            metric.update(chunk, real=real)
    return float(metric.compute())


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
