"""Scoring finished images, outside of any training."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import Evaluation, OnError, evaluate_rewards
from rdm_sdk.rewards.images import read_images
from rdm_sdk.rewards.resolve import RewardFuncs, RunReward, resolve_rewards


def score_images(
    rewards: RewardFuncs,
    images: Tensor | Sequence[object],
    prompts: Sequence[str] | None = None,
    *,
    columns: Mapping[str, list[object]] | None = None,
    group_size: int = 1,
    batch_size: int | None = 32,
    device: torch.device | str | None = None,
    on_error: OnError = "raise",
) -> Evaluation:
    """Score images by any set of rewards: `score_images("hps:v2.1 + clip", images, prompts).outputs["clip"].scores`.

    Args:
        rewards: as `RDMTrainer`'s `reward_funcs`; weights mean nothing here.
        images: RGB float `[N, 3, H, W]` in [0, 1]; or, of one size, PIL images, 8-bit arrays `[H, W, 3]` or 8-bit
            tensors.
        prompts: a list of N, for the rewards that read them.
        columns: further columns, N entries each.
        group_size: samples per prompt, adjacent; rewards that compare within groups need at least 2.
        batch_size: images judged at a time, None for all at once.
        device: where the rewards' models run; None is where the images are.
        on_error: "raise" or "skip", for exceptions inside a reward.

    Raises:
        RewardError: an unknown reward, images that are none or could be meant in two ways, or a reward that cannot
            judge finished images.
    """
    found = resolve_rewards(rewards)
    check_scorable(found, prompts is not None, columns or {}, group_size)
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        if isinstance(images, (str, Image.Image)) or not isinstance(images, (Sequence, Tensor, np.ndarray)):
            raise RewardError(f"images must be a tensor [N, 3, H, W] or a list; got {type(images).__name__}")
        images = read_images(images, "images", RewardError)
    return evaluate_rewards(
        {weighted.label: weighted.reward for weighted in found},
        RewardBatch.from_images(images, prompts, group_size, columns),
        chunk_size=batch_size,
        device=device,
        on_error=on_error,
        gradients_of=(),
    )


def check_scorable(rewards: Sequence[RunReward], prompts: bool, columns: Container[str], group_size: int) -> None:
    """Raise `RewardError` for a reward that cannot judge finished images in groups of a size.

    `prompts` says whether each has a prompt, `columns` names what else there is.
    """
    for reward in rewards:
        if reward.capabilities.needs_models:
            raise RewardError(
                f"reward {reward.label!r} needs the models of a training run, so it cannot score images alone"
            )
        if reward.capabilities.space != "pixel":
            raise RewardError(f"reward {reward.label!r} reads latents, so it cannot score images alone")
        if reward.capabilities.prompts and not prompts:
            raise RewardError(f"reward {reward.label!r} reads prompts; pass one per image")
        if reward.capabilities.scope == "group" and group_size == 1:
            raise RewardError(
                f"reward {reward.label!r} compares the samples of one prompt, and with one of each it has nothing to "
                "compare with: score_images takes a group_size of 2 or more, evaluate() two samples of each prompt or "
                "more; score_folder judges each picture alone"
            )
        for column in reward.capabilities.columns:
            if column not in columns:
                raise RewardError(
                    f"reward {reward.label!r} needs a column {column!r} beside the images, and there is none: "
                    "score_images takes it as an entry of columns, score_folder from its file of prompts; evaluate() "
                    "has prompts alone"
                )
