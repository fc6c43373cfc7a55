"""Rewards that are sound, and unusual: their options decide what they need, or they are kept with more than texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig


class Watched(Reward):
    """Mean brightness; counts how often it is made and how often it judges."""

    capabilities = Capabilities()
    made = judged = 0

    def __init__(self, config: RewardConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        Watched.made += 1

    def score(self, batch: RewardBatch) -> Tensor:
        Watched.judged += 1
        return batch.images.mean(dim=(1, 2, 3))


class Captioned(Watched):
    """Needs a column that an option names, which the class cannot declare."""

    class Config(RewardConfig):
        column: str = ""

    def __init__(self, config: RewardConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.column:
            self.capabilities = replace(self.capabilities, columns=(self.config.column,))


class Compared(Watched):
    """Compares the images of a prompt."""

    capabilities = Capabilities(scope="group")


class Located(Watched):
    """Is kept with the path of its weights."""

    def provenance(self) -> dict[str, object]:
        return super().provenance() | {"weights": Path("some/weights.pt")}


class Unkeepable(Watched):
    """Is kept with a mapping that JSON does not know."""

    def provenance(self) -> dict[str, object]:
        return super().provenance() | {"sizes": {(1, 2): 3}}
