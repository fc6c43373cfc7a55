"""Which pictures of a run are shown: those that a reward scores high enough, gray in the place of the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError, RewardError
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.rewards.scoring import check_scorable, score_images

GRAY = 0.5


class PictureFilter:
    """Puts gray in the place of pictures that a reward scores below a bound ("safety >= 0.9"), or not at all.

    Raises:
        ConfigError: the text is something else, or the reward cannot judge single pictures.
        RewardError: an unknown reward.
    """

    def __init__(self, text: str) -> None:
        spec, _, bound = text.partition(">=")
        try:
            self.least = float(bound)
        except ValueError:
            self.least = math.nan
        if not spec.strip() or not math.isfinite(self.least):
            raise ConfigError(
                f"log_images_filter must be a reward and its least score, such as 'safety >= 0.9'; got {text!r}"
            )
        found = resolve_rewards(spec.strip())
        if len(found) != 1 or found[0].capabilities.scope == "group":
            raise ConfigError(
                f"log_images_filter wants one reward that scores each picture by itself; got {spec.strip()!r}"
            )
        try:
            check_scorable(found, True, (), group_size=1)
        except RewardError as error:
            raise ConfigError(f"log_images_filter={text!r} cannot be used: {error}") from error
        self.reward = found[0].reward

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the pictures `[N, 3, H, W]` in [0, 1] of the prompts, those that are not to be shown all gray."""
        (output,) = score_images(self.reward, images, prompts).outputs.values()
        shown = (output.scores >= self.least).to(images.device)  # NaN is not
        return images.where(shown[:, None, None, None], GRAY)
