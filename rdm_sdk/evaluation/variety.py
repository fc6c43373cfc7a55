"""What a set of images shows beside its distance from another one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.images import check_images, check_prompts


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """Return how much images `[N, 3, H, W]` of the same prompt differ: the mean standard deviation of a pixel.

    A student that shows one picture per prompt has 0; compare with its teacher's.

    Raises:
        DataError: a prompt has one image only, or there is not one prompt per image.
    """
    check_prompts(check_images(images), prompts)
    rows = rows_of(prompts)
    lonely = next((prompt for prompt, places in rows.items() if len(places) < 2), None)
    if lonely is not None:
        raise DataError(f"diversity compares images of the same prompt, and {lonely!r} has one; give two or more each")
    return torch.stack([images[places].float().std(0).mean() for places in rows.values()]).mean().item()


def rows_of(prompts: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each prompt, in the order in which prompts appear."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows


def group_labels(prompts: Sequence[str]) -> list[int] | None:
    """Return the number of each image's prompt; None where every prompt has one image, so that there are no groups."""
    numbers: dict[str, int] = {}
    labels = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return labels if len(numbers) < len(prompts) else None


def teacher_steps_worth(distance: float, teacher: Mapping[int, float]) -> str:
    """Return how many steps the teacher takes to come as near as a distance, such as "13", "below 1" or "40 or more".

    Args:
        distance: a student's Frechet distance.
        teacher: the teacher's own distances by its number of steps, on the same grid and from as many images. Between
            two of them, the logarithm of the steps is interpolated.
    """
    curve = sorted(teacher.items())
    if distance > curve[0][1]:
        return f"below {curve[0][0]}"
    for (fewer, worse), (more, better) in pairwise(curve):
        if worse >= distance > better:
            share = (worse - distance) / (worse - better)
            steps = math.exp((1 - share) * math.log(fewer) + share * math.log(more))
            return f"{float(f'{steps:.2g}'):.15g}"  # two digits, and never as 1.4e+02
    return f"{curve[-1][0]} or more"
