"""Scores of finished images by any rewards, a piece at a time, so that progress shows and memory is bounded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdm_sdk.errors import DataError
from rdm_sdk.evaluation.intervals import mean_interval
from rdm_sdk.evaluation.variety import group_labels, rows_of
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.resolve import PlannedReward, WeightedReward
from rdm_sdk.rewards.scoring import check_scorable

PIECE = 64
"""Images that are turned into floats and judged at a time, or one group where that is more."""
SHOWN = 3
"""Prompts that are named as the best and the worst."""


@dataclass(frozen=True)
class Piece:
    """Images that are judged together."""

    images: Tensor
    """`[n, 3, H, W]`, uint8 or float in [0, 1]; whole groups."""
    prompts: Sequence[str] | None
    columns: Mapping[str, list[object]]


def judges_of(
    planned: Sequence[PlannedReward], prompts: bool, columns: Container[str], group_size: int
) -> list[WeightedReward]:
    """Return rewards ready for use, once what they need is there: some know it only when they have their options.

    Raises:
        RewardError: a reward cannot be made, or needs a column, or groups, that there are not.
    """
    rewards = [reward.make() for reward in planned]
    check_scorable(rewards, prompts, columns, group_size)
    return rewards


def pieces_of(images: Tensor, prompts: Sequence[str], group_size: int) -> Iterable[Piece]:
    """Yield whole groups of images `[N, 3, H, W]`, about `PIECE` of them at a time."""
    size = max(1, PIECE // group_size) * group_size
    for start in range(0, len(images), size):
        yield Piece(images[start : start + size], prompts[start : start + size], {})


def scores_of(
    rewards: Sequence[WeightedReward],
    pieces: Iterable[Piece],
    *,
    group_size: int = 1,
    device: torch.device | str | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Return each reward's scores `[N]` by its label, NaN where it does not apply.

    Raises:
        RewardError: a reward is broken.
        DataError: a reward applies to none of all images.
    """
    found: dict[str, list[Tensor]] = {reward.label: [] for reward in rewards}
    for piece in pieces:
        pixels = piece.images.float() / 255 if piece.images.dtype == torch.uint8 else piece.images
        batch = RewardBatch.from_images(pixels, piece.prompts, group_size, piece.columns)
        result = evaluate_rewards(
            {reward.label: reward.reward for reward in rewards},
            batch,
            chunk_size=32,
            device=device,
            gradients_of=(),
            may_sit_out=found,
        )
        for label, output in result.outputs.items():
            found[label].append(output.scores.cpu())
        done(len(pixels))
    scores = {label: torch.cat(parts) for label, parts in found.items()}
    for label, values in scores.items():
        if values.isnan().all():
            raise DataError(f"reward {label!r} applies to none of the {len(values)} images; leave it out")
    return scores


def summary(scores: Tensor, prompts: Sequence[str] | None, in_groups: bool = False) -> dict[str, Any]:
    """Return what is kept of a reward's scores `[N]`: mean with interval, deviation, the best and the worst prompts.

    There is no interval for a reward that compares within groups, because its scores in a group are not drawn one by
    one, and none of a single score, which tells nothing of how much others differ.
    """
    interval = mean_interval(scores, None if prompts is None else group_labels(prompts))
    kept = scores[~scores.isnan()]
    sure = len(kept) > 1 and not in_groups
    result: dict[str, Any] = {
        "mean": interval.value,
        "low": interval.low if sure else None,
        "high": interval.high if sure else None,
        "deviation": float(kept.std()) if len(kept) > 1 else 0.0,
        "images": len(kept),
    }
    if prompts is not None:
        means = {prompt: float(scores[rows].nanmean()) for prompt, rows in rows_of(prompts).items()}
        ranked = sorted((mean, prompt) for prompt, mean in means.items() if mean == mean)
        result["worst"] = [{"prompt": prompt, "mean": mean} for mean, prompt in ranked[:SHOWN]]
        result["best"] = [{"prompt": prompt, "mean": mean} for mean, prompt in ranked[::-1][:SHOWN]]
    return result
