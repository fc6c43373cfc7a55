"""ImageReward: how much people would prefer an image, given its prompt."""

from __future__ import annotations

from torch import Tensor

from rdm_reward_imagereward.model import load_network, load_tokenizer
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.vision import ImageTransform, PretrainedConfig, find_file

MAX_TOKENS = 35
"""Tokens of a prompt with [CLS] and [SEP]; the model was trained on prompts cut and padded to this length."""


class ImageReward(Reward):
    """ImageReward (arXiv 2304.05977): BLIP-L trained on 137,000 comparisons of images of one prompt.

    Standardized scores, mostly in [-2, 2], without bounds. The image is encoded by a ViT; the prompt by BERT with cross
    attention to the image's tokens; an affine head on the [CLS] token's state gives the score.
    """

    name = "imagereward"
    capabilities = Capabilities(space="pixel", gradient="autograd", prompts=True, parameters=446_206_689)

    class Config(PretrainedConfig):
        tokenizer: str | None = None
        """A hub id or local folder; by default the checkpoint's folder if it holds one, else bert-base-uncased."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or "THUDM/ImageReward"
        file = find_file(source, "ImageReward.pt", self.config.revision)
        self.model = load_network(file, self.config.torch_dtype)
        text = self.model.text.config
        self.tokenizer = load_tokenizer(self.config.tokenizer, file.parent, text.vocab_size)
        self.max_tokens = min(MAX_TOKENS, text.max_position_embeddings)
        self.transform = ImageTransform(self.model.image_size, middle="round")
        self.preprocessing = str(self.transform)

    def score(self, batch: RewardBatch) -> Tensor:
        text = self.tokenizer(
            batch.prompts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(batch.images.device)
        scores: Tensor = self.model(self.transform(batch.images), text.input_ids, text.attention_mask)
        return scores
