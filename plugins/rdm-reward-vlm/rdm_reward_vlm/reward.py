"""A yes/no judge: how sure a vision-language model is that an image shows its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rdm_reward_vlm.answers import QuestionConfig
from rdm_reward_vlm.judge import load_judge
from rdm_reward_vlm.pictures import to_pil
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.vision import PretrainedConfig


class VlmJudge(Reward):
    """VQAScore (arXiv 2404.01291) with the answer "no" as well: P(yes) / (P(yes) + P(no)), in [0, 1].

    The probabilities are those of the next token after a question about the image, summed over the spellings of an
    answer that are one token ("Yes", "yes", " Yes", ...). No gradient: the model's processor works on 8-bit images. A
    prompt that holds one of the model's control tokens, such as "<image>", cannot be asked about: NaN.
    """

    name = "vlm"
    capabilities = Capabilities(
        space="pixel", gradient="none", prompts=True, range=(0.0, 1.0), parameters=3_754_622_976
    )

    class Config(QuestionConfig, PretrainedConfig):
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        """Dtype of the model's weights; scores come in steps of up to .03 in bfloat16."""
        batch_size: int = Field(default=8, ge=1)
        """Images that the model sees at a time, at most; questions of other lengths never go together."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or "Qwen/Qwen2.5-VL-3B-Instruct"
        self.judge = load_judge(source, self.config.revision, self.config.torch_dtype)
        self.preprocessing = f"8 bits, {type(self.judge.processor.image_processor).__name__}"

    def score(self, batch: RewardBatch) -> Tensor:
        scores = torch.full((len(batch),), torch.nan, device=batch.images.device)
        asked = [row for row, prompt in enumerate(batch.prompts) if self.judge.can_ask(prompt)]
        questions = [self.config.asked(batch.prompts[row]) for row in asked]
        for places in self.judge.batches(questions, self.config.batch_size):
            rows = [asked[place] for place in places]
            pictures = [to_pil(batch.images[row]) for row in rows]
            scores[rows] = self.judge.ask(pictures, [questions[place] for place in places]).to(scores.device)
        return scores
