"""The digit classifier: features for a Frechet distance, probabilities for legibility."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rdm_sdk.digits import evaluation_path


class DigitClassifier(nn.Module):
    """A small convolutional classifier of digit images.

    Trained on the same split of the scans as the teacher, judged on the held-out one. Differentiable with respect to
    the images, so that legibility can be used as a pixel reward.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map RGB images `[N, 3, H, W]` in [0, 1] to features `[N, 64]` (the layer before the logits)."""
        gray = F.interpolate(images.mean(dim=1, keepdim=True), size=(16, 16), mode="area")
        hidden: Tensor = self.hidden(self.convolutions(gray * 2 - 1).flatten(1))
        return F.silu(hidden)

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB images `[N, 3, H, W]` in [0, 1] to logits `[N, 10]`."""
        logits: Tensor = self.head(F.dropout(self.features(images), 0.3, self.training))
        return logits

    def legibility(self, images: Tensor, digits: Tensor) -> Tensor:
        """Return the probability `[N]` that each image shows the digit asked for (`digits`, int64 `[N]`)."""
        return self.forward(images).softmax(dim=1).gather(1, digits[:, None])[:, 0]


def scans_to_images(scans: Tensor) -> Tensor:
    """Enlarge scans `[N, 8, 8]` (integers 0-16) to RGB images `[N, 3, 32, 32]` in [0, 1], white ink on black."""
    gray = F.interpolate(scans[:, None].float() / 16, scale_factor=4, mode="bicubic").clamp(0, 1)
    return gray.expand(-1, 3, -1, -1).contiguous()


@cache
def evaluation_tensors() -> dict[str, Tensor]:
    """Return the tensors of the embedded evaluation file: classifier, held-out scans, teacher statistics."""
    return load_file(evaluation_path())


def load_classifier() -> DigitClassifier:
    """Return the embedded classifier, in evaluation mode."""
    prefix = "classifier."
    weights = {k.removeprefix(prefix): v.clone() for k, v in evaluation_tensors().items() if k.startswith(prefix)}
    with torch.device("meta"):  # first weights, drawn at random, would move a run in which somebody measures images
        classifier = DigitClassifier()
    classifier.load_state_dict(weights, assign=True)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images `[N, 3, H, W]` classified as their labels `[N]`."""
    correct = classifier(images).argmax(dim=1) == labels
    return float(correct.float().mean())
