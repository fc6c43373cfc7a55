"""Diversity: how far an image is from the others of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError
from rdm_sdk.vision import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, PretrainedConfig, load_pretrained

_KINDS = ("dinov2", "dinov2_with_registers")


class DinoDiversity(Reward):
    """Mean distance (1 - cosine, in [0, 2]) of a sample's DINOv2 [CLS] embedding to those of its group's others.

    The mean over a group is the mean over its pairs, so raising it keeps a student from drawing one picture per prompt.
    A group of one has no pairs: NaN.
    """

    name = "dino"
    capabilities = Capabilities(
        space="pixel", gradient="autograd", scope="group", range=(0.0, 2.0), parameters=22_056_576
    )

    class Config(PretrainedConfig):
        pass

    config: Config
    transform = ImageTransform(224, resize_to=256, mean=IMAGENET_MEAN, std=IMAGENET_STD, middle="round")
    preprocessing = str(transform)

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or "facebook/dinov2-small"
        self.model = load_pretrained(AutoModel, source, "DINOv2", self.config.revision, self.config.torch_dtype)
        kind = self.model.config.model_type
        if kind not in _KINDS:
            raise RewardError(
                f"{source!r} holds a model of type {kind!r}; reward 'dino' takes {' or '.join(_KINDS)}, such as "
                "path=facebook/dinov2-base"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Map RGB images `[N, 3, H, W]` in [0, 1] to unit vectors, float32 `[N, D]`; differentiable."""
        pixels = self.transform(images).to(self.model.dtype)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)

    def score(self, batch: RewardBatch) -> Tensor:
        size = batch.group_size
        if size == 1:
            return torch.full((len(batch),), torch.nan, device=batch.images.device)
        return mean_distance(self.embed(batch.images).unflatten(0, (-1, size))).flatten()


def mean_distance(embeddings: Tensor) -> Tensor:
    """Return each sample's mean cosine distance `[P, G]` to the others of its group, for unit vectors `[P, G, D]`."""
    # Between unit vectors 1 - cosine is half the squared distance, which rounding cannot make negative.
    apart = (embeddings[:, :, None] - embeddings[:, None]).square().sum(dim=-1) / 2
    return apart.sum(dim=-1) / (embeddings.shape[1] - 1)
