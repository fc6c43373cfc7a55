"""A question about an image, and what its answer counts for."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import torch
from pydantic import field_validator
from torch import Tensor

from rdm_sdk import RewardConfig

YES, NO = ("Yes", "yes", "YES", " Yes", " yes", " YES"), ("No", "no", "NO", " No", " no", " NO")
"""The spellings of an answer, as the token that a model begins it with."""
DEFAULT_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


class QuestionConfig(RewardConfig):
    """What a judge is asked."""

    question: str = DEFAULT_QUESTION
    """What the model is asked; {prompt} stands for the prompt."""

    @field_validator("question")
    @classmethod
    def _names_the_prompt(cls, question: str) -> str:
        if "{prompt}" not in question:
            raise ValueError("the question must contain {prompt}, where each image's prompt goes")
        return question

    def asked(self, prompt: str) -> str:
        """Return the question about an image of a prompt; other braces mean nothing."""
        return self.question.replace("{prompt}", prompt)


def yes_share(yes: Tensor, no: Tensor) -> Tensor:
    """Return P(yes) / (P(yes) + P(no)), VQAScore (arXiv 2404.01291) with the answer "no" as well; `[...]` in [0, 1].

    Args:
        yes: logits, or log probabilities, of the tokens that say yes, `[..., tokens]`; none at all is P(yes) = 0.
        no: the same of those that say no. With neither, the share is NaN.
    """
    # exp(a) / (exp(a) + exp(b)): what logits lack to be log probabilities cancels.
    return (yes.logsumexp(dim=-1) - no.logsumexp(dim=-1)).sigmoid()


def spelled(likeliest: Sequence[tuple[str, float]], forms: Collection[str]) -> Tensor:
    """Return the log probabilities, float64 `[n]`, of those of a model's likeliest tokens that are a form of an answer.

    Args:
        likeliest: tokens and their log probabilities.
        forms: texts of tokens, such as `YES`.
    """
    return torch.tensor([logarithm for token, logarithm in likeliest if token in forms], dtype=torch.float64)


def written_yes(text: str) -> float:
    """Return 1 for an answer whose first word is yes, 0 for one whose first word is no, NaN for any other."""
    found = re.match(r"\W*(\w+)", text)
    return {"yes": 1.0, "no": 0.0}.get(found[1].lower() if found else "", math.nan)


def written_number(text: str) -> float:
    """Return the number in an answer; NaN unless it holds exactly one, such as "7", "8.5." or "Rating: -2"."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    number = float(found[0]) if len(found) == 1 else math.nan
    return number if math.isfinite(number) else math.nan
