"""GenEval: whether the objects, counts, colors and positions that a prompt asks for are in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial as bound
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rdm_reward_geneval.models import Detector, colors_of
from rdm_reward_geneval.rules import Box, Wanted, kept, parse, partial, strict
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.testing import example_images
from rdm_sdk.vision import PretrainedConfig, load_clip

HUB, CLIP_HUB = "google/owlv2-base-patch16-ensemble", "openai/clip-vit-large-patch14"


class GenEval(Reward):
    """GenEval's rules (arXiv 2310.11513) on OWLv2's detections, with colors by CLIP ViT-L/14; in [0, 1], no gradient.

    What a prompt asks for stands in the dataset's columns `include` and, perhaps, `exclude`, as in GenEval's metadata.
    `geneval:partial` (the default) is the mean over counts, colors and positions, `geneval:strict` GenEval's own
    verdict, 0 or 1. GenEval's detector is another one (Mask2Former, of COCO's 80 kinds), so figures do not compare.
    """

    name = "geneval"
    capabilities = Capabilities(
        space="pixel",
        gradient="none",
        columns=("include",),
        reads=("exclude",),
        range=(0.0, 1.0),
        parameters=582_583_305,
    )

    class Config(PretrainedConfig):
        variant: Literal["partial", "strict"] = "partial"
        """How what was found becomes a score; as in `geneval:strict`."""
        clip_path: str = CLIP_HUB
        """A hub id or local folder with the CLIP that tells colors, in `transformers` format."""
        threshold: float = Field(default=0.3, gt=0, lt=1)
        """How sure the detector must be of an object."""
        counting_threshold: float = Field(default=0.3, gt=0, lt=1)
        """The same where more than one object of a kind is asked for; GenEval's own, of another detector, is 0.9."""
        max_overlap: float = Field(default=0.5, gt=0, le=1)
        """From which intersection over union on a less sure box of a kind is the same object; 1 keeps all boxes."""
        batch_size: int = Field(default=8, ge=1)
        """Images that the detector sees at a time, at most."""

    config: Config
    preprocessing = "8 bits, padded to a square, Owlv2ImageProcessorPil; crops by box"

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.detector = Detector(self.config.path or HUB, self.config.revision, self.config.torch_dtype)
        self.clip = load_clip(self.config.clip_path, dtype=self.config.torch_dtype)

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        """Return which samples ask for anything.

        Raises:
            RewardError: an entry of `include` or `exclude` is not of GenEval's form. A run asks before it trains.
        """
        includes = columns.get("include", [None] * len(prompts))
        excludes = columns.get("exclude", [None] * len(prompts))
        return [bool(_asked(*entries)[0]) for entries in zip(includes, excludes, strict=True)]

    def score(self, batch: RewardBatch) -> Tensor:
        includes = batch.columns["include"]
        excludes = batch.columns.get("exclude", [None] * len(batch))
        asked = [_asked(*entries) for entries in zip(includes, excludes, strict=True)]
        found = self._found(batch.images, [_kinds(*entry) for entry in asked])
        judge = strict if self.config.variant == "strict" else partial
        scores = []
        for image, (include, exclude), boxes in zip(batch.images, asked, found, strict=True):
            counting = any(wanted.count > 1 for wanted in include)
            threshold = self.config.counting_threshold if counting else self.config.threshold
            objects = {kind: kept(places, threshold, self.config.max_overlap) for kind, places in boxes.items()}
            scores.append(
                judge(include, exclude, objects, bound(colors_of, self.clip, image)) if include else torch.nan
            )
        return torch.tensor(scores)

    def _found(self, images: Tensor, kinds: Sequence[tuple[str, ...]]) -> list[dict[str, list[Box]]]:
        """Return what is in each image of the kinds that its prompt names; images of the same kinds go together."""
        found: list[dict[str, list[Box]]] = [{} for _ in kinds]
        for named in dict.fromkeys(kinds):
            rows = [row for row, these in enumerate(kinds) if these == named]
            for start in range(0, len(rows) if named else 0, self.config.batch_size):
                together = rows[start : start + self.config.batch_size]
                for row, boxes in zip(together, self.detector.find(images[together], named), strict=True):
                    found[row] = boxes
        return found

    def example(self) -> RewardBatch:
        one: list[object] = [{"class": "fox", "count": 1, "color": "red"}]
        two: list[object] = [{"class": "boat", "count": 1}, {"class": "bird", "count": 2, "position": ("above", 0)}]
        columns: dict[str, list[object]] = {"include": [one, one, two, two]}
        return RewardBatch.from_images(example_images(4), ["a red fox"] * 2 + ["birds above a boat"] * 2, 2, columns)


def _asked(include: object, exclude: object) -> tuple[list[Wanted], list[Wanted]]:
    """Return what two entries of the columns ask for; None asks for nothing."""
    wanted = [] if include is None else parse(include, "include")
    return wanted, [] if exclude is None else parse(exclude, "exclude")


def _kinds(include: Sequence[Wanted], exclude: Sequence[Wanted]) -> tuple[str, ...]:
    """Return the kinds of objects to look for, each once, in their order."""
    return tuple(dict.fromkeys(wanted.kind for wanted in (*include, *exclude)))
