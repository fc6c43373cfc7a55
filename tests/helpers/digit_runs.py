"""What tests of runs on the embedded teacher share: rewards of one line, data, and copies of weights."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, digits


def brightness(images: Tensor, prompts: list[str], **columns: object) -> Tensor:
    """Score a picture by its mean: a plain function, so it acts through its scores."""
    return images.mean(dim=(1, 2, 3))


class Bright(Reward):
    """The mean of the picture, with a gradient and no critic."""

    name = "bright"
    capabilities = Capabilities(space="pixel", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(1, 2, 3))


def pictures() -> Dataset:
    """Return the digits' prompts, each beside a real picture."""
    labels, images = digits.heldout_labels().tolist(), digits.heldout_images()
    chosen = [(images[labels.index(digit)].permute(1, 2, 0) * 255).byte().numpy() for digit in range(10)]
    return Dataset.from_dict({"prompt": digits.prompts(), "image": [Image.fromarray(array) for array in chosen]})


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Return a copy of all trained weights, by name."""
    return {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if p.requires_grad}


def weights_of_roles(trainer: RDMTrainer, *roles: str) -> list[Tensor]:
    """Return a copy of the weights that some roles train."""
    return [p.detach().clone() for role in roles for p in trainer.parameters_of(role)]


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Return whether two lists of weights are equal bit for bit."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
