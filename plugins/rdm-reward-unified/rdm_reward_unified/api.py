"""UnifiedReward behind OpenAI's API, as vLLM serves it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from rdm_reward_vlm.chat import Choice
from rdm_reward_vlm.endpoint import Endpoint, EndpointConfig, Question
from torch import Tensor

from rdm_reward_unified.text import FORMS, HIGH, LOW
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError


class UnifiedApi(Reward):
    """The `unified` reward (UnifiedReward, arXiv 2503.05236) of a model behind OpenAI's API; in [1, 5], no gradient.

    An answer that holds no rating in 1 to 5, or was filtered out, is NaN. Asynchronous: it is asked first and
    waited for last.
    """

    name = "unified-api"
    capabilities = Capabilities(prompts=True, asynchronous=True, range=(LOW, HIGH), parameters=0)

    class Config(EndpointConfig):
        variant: Literal["final", "axes"] = "final"
        """Which question, which must be the one that the model was trained on; as in `unified-api:axes`."""
        max_new_tokens: int = Field(default=512, ge=1)
        """How much the model may write; a rating that comes later is missed."""

    config: Config
    preprocessing = "8 bits, PNG"

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.form = FORMS[self.config.variant]
        self.endpoint = Endpoint(self.config, self.config.max_new_tokens)
        choice = self.endpoint.try_out(self.form.ask("a gray square"))
        if choice.finish != "content_filter" and math.isnan(self._score(choice)):
            titles = " and ".join(map(repr, self.form.titles))
            raise RewardError(
                f"{self.config.model!r} does not rate as UnifiedReward does: asked about a gray square, it wrote "
                f"{choice.text[-200:]!r}, without a number of 1 to 5 after {titles}; take a model that was trained on "
                f"this question, such as {self.form.model}, or more max_new_tokens"
            )

    async def score_async(self, batch: RewardBatch) -> Tensor:
        pairs = zip(batch.images, batch.prompts, strict=True)
        choices = await self.endpoint.ask([Question(image, self.form.ask(prompt)) for image, prompt in pairs])
        return torch.tensor([self._score(choice) for choice in choices])

    def _score(self, choice: Choice) -> float:
        return math.nan if choice.finish == "content_filter" else self.form.read(choice.text)
