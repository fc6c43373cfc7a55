"""UnifiedReward: a vision-language model that writes its rating of an image and its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from rdm_reward_vlm.judge import load_judge
from rdm_reward_vlm.pictures import to_pil
from torch import Tensor

from rdm_reward_unified.text import FORMS, HIGH, LOW
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError
from rdm_sdk.vision import PretrainedConfig


class UnifiedReward(Reward):
    """UnifiedReward (arXiv 2503.05236): the rating of 1 to 5 that a vision-language model writes about an image.

    `unified:final` (the default) reads the number after "Final Score:", `unified:axes` (UnifiedReward 2.0) the mean of
    alignment, coherence and style. The answer is written without chance, the likeliest token each time. One that holds
    no rating in 1 to 5 is NaN. No gradient. A prompt that holds one of the model's control tokens, such as
    "<|im_end|>", cannot be asked about, so the reward is not for it.
    """

    name = "unified"
    capabilities = Capabilities(
        space="pixel", gradient="none", prompts=True, range=(LOW, HIGH), parameters=8_292_166_656
    )

    class Config(PretrainedConfig):
        variant: Literal["final", "axes"] = "final"
        """Which question, and by default which model; as in `unified:axes`."""
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        """Dtype of the model's weights."""
        max_new_tokens: int = Field(default=512, ge=1)
        """How much the model may write; a rating that comes later is missed."""
        batch_size: int = Field(default=8, ge=1)
        """Images that the model sees at a time, at most; questions of other lengths never go together."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.form = FORMS[self.config.variant]
        source = self.config.path or self.form.model
        self.judge = load_judge(source, self.config.revision, self.config.torch_dtype)
        if self.judge.processor.chat_template is None:
            raise RewardError(
                f"the processor of {source!r} has no chat template, so it cannot be asked as UnifiedReward is; copy "
                "chat_template.jinja (or chat_template.json) beside the weights"
            )
        self.preprocessing = f"8 bits, {type(self.judge.processor.image_processor).__name__}"

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        return [self.judge.can_ask(prompt) for prompt in prompts]

    def score(self, batch: RewardBatch) -> Tensor:
        questions = [self.form.ask(prompt) for prompt in batch.prompts]
        scores = torch.full((len(batch),), torch.nan)
        for rows in self.judge.batches(questions, self.config.batch_size):
            pictures = [to_pil(batch.images[row]) for row in rows]
            texts = answers(self.judge, pictures, [questions[row] for row in rows], self.config.max_new_tokens)
            scores[rows] = torch.tensor([self.form.read(text) for text in texts])
        return scores


@torch.no_grad()
def answers(judge: Any, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Return what a judge writes about N images of one size, asked N questions of one length: nothing is padded."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    inputs = judge.processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(judge.model.device, judge.model.dtype)
    # Checkpoints bring settings for sampling along; none of them is for an answer without chance.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    written = judge.model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens)
    texts: list[str] = judge.processor.tokenizer.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts
