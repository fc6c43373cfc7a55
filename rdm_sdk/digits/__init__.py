"""The embedded digits: a small, complete text-to-image teacher with everything needed to judge its students.

The teacher is a `StableDiffusion3Pipeline` trained on scikit-learn's handwritten digits (UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0). It ships inside the package, so demo, tests and benchmarks start at once and from the
same weights everywhere. `benchmarks/digits_teacher.py` trains all of it again from nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT_TEMPLATES = ("a handwritten {}", "the digit {}", "a scan of the number {}", "{}")
IMAGE_SIZE = 32
"""Height and width of the teacher's images in pixels (the 8x8 scans, bicubically enlarged four times)."""
TEXT_TOKENS = 4
"""The `max_sequence_length` that the teacher's prompts need; at its pipeline's default, 256, a step takes ten times as
long."""

_ASSETS = Path(__file__).parent / "assets"


def teacher_path() -> str:
    """Return the folder of the embedded teacher, ready for `DiffusionPipeline.from_pretrained` and `RDMTrainer`."""
    return str(_ASSETS / "teacher")


def evaluation_path() -> str:
    """Return the safetensors file with the digit classifier and the held-out real scans."""
    return str(_ASSETS / "evaluation.safetensors")


def prompts() -> list[str]:
    """Return one prompt per digit, "a handwritten zero" to "a handwritten nine"."""
    return [PROMPT_TEMPLATES[0].format(word) for word in DIGIT_WORDS]


def digit_in_prompt(prompt: str) -> int | None:
    """Return the digit that a prompt names as a word or a numeral, or None if it names none or several."""
    words = re.findall(r"[a-z]+|[0-9]+", prompt.lower())
    named = {DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS}
    named |= {int(word) for word in words if word.isdigit() and len(word) == 1}
    return named.pop() if len(named) == 1 else None


def heldout_images() -> Tensor:
    """Return the 500 held-out real digits, which nothing was trained on, as images `[500, 3, 32, 32]` in [0, 1]."""
    from rdm_sdk.digits.classifier import evaluation_tensors, scans_to_images

    return scans_to_images(evaluation_tensors()["heldout_scans"])


def heldout_labels() -> Tensor:
    """Return the held-out digits' labels, int64 `[500]`."""
    from rdm_sdk.digits.classifier import evaluation_tensors

    return evaluation_tensors()["heldout_labels"]
