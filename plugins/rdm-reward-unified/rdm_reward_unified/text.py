"""What UnifiedReward was trained to be asked, and how its answer is read.

The questions are those of CodeGoat24/UnifiedReward (its repository on GitHub), inference_qwen/image_generation/
qwen_point_score_image_generation.py and inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py.
They are part of the models: other words give other ratings.
"""

# ruff: noqa: E501 - the models were trained on lines of this length

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LOW, HIGH = 1.0, 5.0
"""The range of a rating; a number outside of it is no rating."""


@dataclass(frozen=True)
class Form:
    """A way to ask, and where the ratings stand in the answer."""

    model: str
    """The hub id of the model that was trained on it."""
    question: str
    """What it is asked; the prompt follows, in brackets."""
    titles: tuple[str, ...]
    """What the ratings stand after; the score is their mean."""

    def ask(self, prompt: str) -> str:
        """Return the question about an image of a prompt."""
        return f"{self.question}Your task is provided as follows:\nText Caption: [{prompt}]"

    def read(self, answer: str) -> float:
        """Return the mean of an answer's ratings, in [1, 5]; NaN unless each title has one, where it stands last."""
        ratings = []
        for title in self.titles:
            found = re.findall(rf"{re.escape(title)}\s*:\s*(\d+(?:\.\d+)?)", answer)
            rating = float(found[-1]) if found else math.nan
            ratings.append(rating if LOW <= rating <= HIGH else math.nan)
        return sum(ratings) / len(ratings)


FINAL = Form(
    model="CodeGoat24/UnifiedReward-qwen-7b",
    question=(
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic appeal.\n"
        "Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    ),
    titles=("Final Score",),
)
AXES = Form(
    model="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
    question=(
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\n"
        "Coherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n\n"
    ),
    titles=("Alignment Score (1-5)", "Coherence Score (1-5)", "Style Score (1-5)"),
)
FORMS = {"final": FINAL, "axes": AXES}
"""The forms, by the variant that asks so."""
