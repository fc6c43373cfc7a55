"""Legibility of the embedded digits: a differentiable pixel reward."""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk import digits
from rdm_sdk.digits.classifier import load_classifier
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch


class Legibility(Reward):
    """The embedded classifier's probability, in [0, 1], that an image shows the digit its prompt names.

    NaN where the prompt names no digit. For the embedded digits only: the classifier knows nothing else.
    """

    name = "legibility"
    capabilities = Capabilities(space="pixel", gradient="autograd", prompts=True, range=(0.0, 1.0), parameters=104_618)
    preprocessing = "gray, area-resized to 16x16"

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier().requires_grad_(False)

    def example(self) -> RewardBatch:
        labels = digits.heldout_labels()[:8].tolist()
        # Off 0 and 1, where a step along the gradient would be cut off.
        images = digits.heldout_images()[:8] * 0.9 + 0.05
        return RewardBatch.from_images(images, [digits.DIGIT_WORDS[label] for label in labels], 2)

    def score(self, batch: RewardBatch) -> Tensor:
        images = batch.images
        named_digits = [digits.digit_in_prompt(prompt) for prompt in batch.prompts]
        asked = torch.tensor([0 if digit is None else digit for digit in named_digits], device=images.device)
        named = torch.tensor([digit is not None for digit in named_digits], device=images.device)
        return self.classifier.legibility(images, asked).masked_fill(~named, torch.nan)
