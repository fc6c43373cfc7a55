"""How much of the text that a prompt asks for can be read in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from torch import Tensor

from rdm_reward_ocr.reader import Reader
from rdm_reward_ocr.text import quoted, similarity
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError


class TextInPicture(Reward):
    """1 minus the normalized edit distance between the text asked for and the text read, in [0, 1]; no gradient.

    The text asked for is the entry of the dataset's column `text`; without that column, what stands in quotes in the
    prompt; it is not for samples where none is asked for. Text is read by PaddleOCR's PP-OCRv6 (small), with
    real weights that come with `rapidocr`. Case and spaces do not count; the distance is divided by the length of the
    longer text, so letters too many cost as much as letters that are missing.
    """

    name = "ocr"
    capabilities = Capabilities(
        space="pixel",
        gradient="none",
        prompts=True,
        reads=("text",),
        range=(0.0, 1.0),
        parameters=7_790_000,  # by the size of the two files of weights
    )

    class Config(RewardConfig):
        column: str = Field(default="text", min_length=1)
        """Column of the dataset with the text asked for; None in a row where there is none."""
        threads: int = Field(default=1, ge=1)
        """Pictures that are read at the same time, on as many cores; scores do not depend on it."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        if "column" in self.config.model_fields_set:  # who names one means it
            self.capabilities = replace(self.capabilities, columns=(self.config.column,), reads=())
        self.reader = Reader(self.config.threads)
        self.preprocessing = f"8 bits, {self.reader.source}"

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        return [bool(text) for text in self.texts(prompts, columns)]

    def score(self, batch: RewardBatch) -> Tensor:
        asked = self.texts(batch.prompts, batch.columns)
        shown = batch.images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        read = self.reader.read(shown.cpu().numpy())
        pairs = zip(asked, read, strict=True)
        return torch.tensor([similarity(text, seen) if text else torch.nan for text, seen in pairs])

    def texts(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[str]:
        """Return the text that each sample is to show, "" where none is asked for.

        Raises:
            RewardError: an entry of the column is neither a text nor None.
        """
        entries = columns.get(self.config.column)
        if entries is None:
            return [" ".join(quoted(prompt)) for prompt in prompts]
        for entry in entries:
            if not isinstance(entry, (str, type(None))):
                raise RewardError(
                    f"reward {self.name!r}: the column {self.config.column!r} must hold texts, or None where no text "
                    f"is asked for; got {entry!r}"
                )
        return ["" if entry is None else str(entry).strip() for entry in entries]

    def example(self) -> RewardBatch:
        words, columns = ["open", "open", "bread", "bread"], {}
        if self.capabilities.columns:
            columns = {self.config.column: list[object](words)}
        images = torch.stack([_sign(word) for word in ("open", "oven", "bread", "broad")])
        return RewardBatch.from_images(images, [f'a sign that says "{word}"' for word in words], 2, columns)


def _sign(word: str) -> Tensor:
    """Return a word in dark letters on light ground, `[3, 64, 96]`."""
    picture = Image.new("RGB", (96, 64), (230, 230, 220))
    ImageDraw.Draw(picture).text((48, 32), word, (20, 20, 60), ImageFont.load_default(size=28), anchor="mm")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
