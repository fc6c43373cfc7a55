"""CLIPScore: the cosine between an image and its prompt."""

from __future__ import annotations

from dataclasses import replace

from rdm_sdk.rewards.base import RewardConfig
from rdm_sdk.vision import ClipReward, load_clip


class ClipScore(ClipReward):
    """CLIPScore (arXiv 2104.08718) without its factor of 2.5 and its cut at 0: the plain cosine, in [-1, 1].

    CLIP ViT-L/14 by default, on which good pairs score .27 to .32; another CLIP has another scale.
    """

    name = "clip"
    capabilities = replace(ClipReward.capabilities, parameters=427_616_513)

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or "openai/clip-vit-large-patch14"
        self.use(load_clip(source, self.config.revision, self.config.torch_dtype))
