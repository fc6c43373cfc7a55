"""A yes/no judge: how sure a vision-language model is that an image shows its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Literal

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from rdm_reward_vlm.judge import load_judge
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

    class Config(PretrainedConfig):
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        """Dtype of the model's weights; scores come in steps of up to .03 in bfloat16."""
        question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
        """What the model is asked; {prompt} stands for the prompt."""
        batch_size: int = Field(default=8, ge=1)
        """Images that the model sees at a time, at most; questions of other lengths never go together."""

        @field_validator("question")
        @classmethod
        def _names_the_prompt(cls, question: str) -> str:
            if "{prompt}" not in question:
                raise ValueError("the question must contain {prompt}, where each image's prompt goes")
            return question

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or "Qwen/Qwen2.5-VL-3B-Instruct"
        self.judge = load_judge(source, self.config.revision, self.config.torch_dtype)
        self.preprocessing = f"8 bits, {type(self.judge.processor.image_processor).__name__}"

    def score(self, batch: RewardBatch) -> Tensor:
        asked = {
            row: self.config.question.replace("{prompt}", prompt)
            for row, prompt in enumerate(batch.prompts)
            if self.judge.can_ask(prompt)
        }
        scores = torch.full((len(batch),), torch.nan, device=batch.images.device)
        for rows in self._together(asked):
            pictures = [_to_pil(batch.images[row]) for row in rows]
            scores[rows] = self.judge.ask(pictures, [asked[row] for row in rows]).to(scores.device)
        return scores

    def _together(self, questions: Mapping[int, str]) -> Iterator[list[int]]:
        """Yield rows whose questions are of one length, `batch_size` at most."""
        lengths = {question: self.judge.length(question) for question in set(questions.values())}

        def length(row: int) -> int:
            return lengths[questions[row]]

        for _, group in groupby(sorted(questions, key=length), key=length):
            rows = list(group)
            for start in range(0, len(rows), self.config.batch_size):
                yield rows[start : start + self.config.batch_size]


def _to_pil(image: Tensor) -> Image.Image:
    """Round an RGB image `[3, H, W]` in [0, 1] to 8 bits."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
