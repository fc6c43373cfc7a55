"""PickScore: the scaled cosine between an image and its prompt under a CLIP tuned to people's choices."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from rdm_sdk.rewards.base import RewardConfig
from rdm_sdk.vision import ClipReward, load_clip

HUB = "yuvalkirstain/PickScore_v1"


class PickScore(ClipReward):
    """PickScore (arXiv 2305.01569): exp(logit scale) times the cosine under a CLIP ViT-H/14.

    Good pairs score 20 to 23. The bounds are plus and minus the checkpoint's scale. Differences, not values, mean
    something: exp(a) / (exp(a) + exp(b)) is the chance that people choose the first of two images of one prompt.
    """

    name = "pickscore"
    capabilities = replace(ClipReward.capabilities, range=(-inf, inf), parameters=986_109_441)

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.use(load_clip(self.config.path or HUB, self.config.revision, self.config.torch_dtype))
        self.scale = self.encoder.logit_scale
        self.capabilities = replace(self.capabilities, range=(-self.scale, self.scale))
