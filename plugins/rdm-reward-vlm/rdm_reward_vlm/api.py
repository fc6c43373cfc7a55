"""The yes/no judge behind OpenAI's API: vLLM, SGLang, llama.cpp's server, OpenAI and whatever else speaks it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rdm_reward_vlm.answers import (
    DEFAULT_QUESTION,
    NO,
    YES,
    QuestionConfig,
    spelled,
    written_number,
    written_yes,
    yes_share,
)
from rdm_reward_vlm.chat import Choice
from rdm_reward_vlm.endpoint import Endpoint, EndpointConfig, Question
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError

TOP_LOGPROBS = 20
"""The most that OpenAI gives, and vLLM by default."""
MAX_WRITTEN = 1024
"""Tokens that a model may write where its text is read."""


class VlmApi(Reward):
    """The `vlm` reward of a model behind OpenAI's API: P(yes) / (P(yes) + P(no)) of its next token, in [0, 1].

    Log probabilities come for the 20 likeliest tokens: an answer that is not among them counts as impossible, and an
    image with neither answer among them is NaN. An endpoint that gives none is an error before training; `read=text`
    takes the written yes or no in their place, 1 or 0, and `read=number` the number that the question asks for. No
    gradient. Asynchronous: it is asked first and waited for last.
    """

    name = "vlm-api"
    capabilities = Capabilities(prompts=True, asynchronous=True, range=(0.0, 1.0), parameters=0)

    class Config(QuestionConfig, EndpointConfig):
        read: Literal["logprobs", "text", "number"] = "logprobs"
        """What becomes the score: the probabilities of yes and no; the written one, 1 or 0; the written number."""
        top_logprobs: int | None = Field(default=None, ge=2)
        """Of how many tokens to ask for log probabilities, for an endpoint that gives fewer than 20; null is 20."""

        @model_validator(mode="after")
        def _go_together(self) -> VlmApi.Config:
            if self.read == "number" and self.question == DEFAULT_QUESTION:
                raise ValueError("read=number needs a question that asks for a number; the default asks for yes or no")
            if self.read != "logprobs" and self.top_logprobs is not None:
                raise ValueError(f"top_logprobs={self.top_logprobs} is for read=logprobs; read={self.read} reads none")
            return self

    config: Config
    preprocessing = "8 bits, PNG"

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        if self.config.read == "logprobs":
            self.endpoint = Endpoint(self.config, 1, self.config.top_logprobs or TOP_LOGPROBS)
        else:
            self.endpoint = Endpoint(self.config, MAX_WRITTEN)
        if self.config.read == "number":
            self.capabilities = replace(self.capabilities, range=None)
        self._check(self.endpoint.try_out(self.config.asked("a gray square")))

    async def score_async(self, batch: RewardBatch) -> Tensor:
        pairs = zip(batch.images, batch.prompts, strict=True)
        choices = await self.endpoint.ask([Question(image, self.config.asked(prompt)) for image, prompt in pairs])
        return torch.tensor([self._score(choice) for choice in choices])

    def _score(self, choice: Choice) -> float:
        """Return what an answer is worth; NaN if it says neither, was cut off, or the endpoint filtered it out.

        Raises:
            RewardError: it holds no log probabilities, and these are to be read.
        """
        if choice.finish == "content_filter":
            return math.nan
        if self.config.read == "logprobs":
            if choice.likeliest is None:
                raise RewardError(
                    f"{self.config.url} gives no log probabilities (logprobs, top_logprobs) of {self.config.model!r}; "
                    "serve a model that has them, or let its text be read: read=text scores the written yes or no as 1 "
                    "or 0, read=number the number that your question asks for"
                )
            return float(yes_share(spelled(choice.likeliest, YES), spelled(choice.likeliest, NO)))
        if choice.finish == "length":
            return math.nan
        return written_yes(choice.text) if self.config.read == "text" else written_number(choice.text)

    def _check(self, choice: Choice) -> None:
        """Raise `RewardError` if the answer about a gray square, whatever it is, cannot be read."""
        if choice.finish == "content_filter" or not math.isnan(self._score(choice)):
            return
        wanted = "the number" if self.config.read == "number" else "yes or no"
        if self.config.read == "logprobs":
            began = ", ".join(repr(token) for token, _ in (choice.likeliest or [])[:8]) or "nothing"
            got, hint = f"its likeliest first tokens are {began}", ", or let the text be read (read=text)"
        else:
            got, hint = (
                f"it wrote {choice.text[:200]!r}" + (" and was cut off" if choice.finish == "length" else ""),
                "",
            )
        raise RewardError(
            f"{self.config.model!r} does not answer {self.config.question!r} with {wanted}: {got}. Ask another "
            f"question, take a model that answers at once without thinking first{hint}"
        )
