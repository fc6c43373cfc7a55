"""HPS v2 and v2.1: the cosine between an image and its prompt under a CLIP tuned to people's preferences."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from rdm_sdk import RewardBatch, RewardError
from rdm_sdk.files import looks_local
from rdm_sdk.rewards.base import RewardConfig
from rdm_sdk.vision import (
    CLIP_VIT_H,
    ClipEncoder,
    ClipReward,
    ImageTransform,
    clip_from_open_clip,
    find_file,
    load_clip,
    read_tensors,
)

Variant = Literal["v2", "v2.1"]

HUB = "xswu/HPSv2"
FILES: dict[Variant, str] = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HumanPreferenceScore(ClipReward):
    """HPS v2 (arXiv 2306.09341) or v2.1: the cosine under a CLIP ViT-H/14, without a logit scale, in [-1, 1].

    Good pairs score .14 to .34; papers show it times 100. Scores of v2 and of v2.1 are not comparable, nor are those of
    two ways to resize, so both stand in the provenance. The longer side of an image becomes 224, the rest is black.
    """

    class Config(ClipReward.Config):
        variant: Variant = "v2.1"
        """Which checkpoint; as in `hps:v2`."""
        path: str | None = None
        """A hub id, or a local file or folder, instead of `xswu/HPSv2`; the README says what may be there."""
        tokenizer: str | None = None
        """A hub id or local folder; by default where the checkpoint is, or else that of LAION's CLIP ViT-H/14."""

    name = "hps"
    capabilities = replace(ClipReward.capabilities, parameters=986_109_441)
    config: Config
    transform = ImageTransform(224, fit="pad")

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        source = self.config.path or HUB
        file = find_checkpoint(source, self.config.variant, self.config.revision)
        if file is None:
            encoder = load_clip(source, self.config.revision, self.config.torch_dtype, self.config.tokenizer)
        else:
            encoder = self._load(file)
        self.use(encoder)

    def score(self, batch: RewardBatch) -> Tensor:
        images = self.encoder.embed_images(self.transform(batch.images))
        return (images * self.encoder.embed_prompts([cleaned(prompt) for prompt in batch.prompts])).sum(dim=-1)

    def _load(self, file: Path) -> ClipEncoder:
        """Return the CLIP of a checkpoint with open_clip's names."""
        own = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return clip_from_open_clip(
            read_tensors(file),
            architecture_beside(file),
            self.config.tokenizer or (str(file.parent) if own else TOKENIZER),
            f"HPS {self.config.variant} at {str(file)!r}",
            self.config.torch_dtype,
        )


_STRAIGHT = {
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
}


def cleaned(prompt: str) -> str:
    """Return a prompt as open_clip's tokenizer reads it: HTML entities are characters, and curly quotes straight.

    The original does this, and more about texts in broken encodings, with ftfy; transformers' tokenizer does neither.
    """
    return html.unescape(html.unescape(prompt)).translate(_STRAIGHT)


def find_checkpoint(source: str, variant: Variant, revision: str | None = None) -> Path | None:
    """Return the checkpoint file with open_clip's names at a source; None if a `transformers` model is there.

    Raises:
        RewardError: there is neither, or it is named as another variant's.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / FILES[variant]).is_file():
        for file in FILES.values():
            if (folder / file).is_file():
                _refuse_other(file, variant, is_file=True)
        if (folder / "config.json").is_file():
            _refuse_other(folder.name, variant, is_file=False)
            return None
    if source == HUB or looks_local(source):
        found = find_file(source, FILES[variant], revision)
        _refuse_other(found.name, variant, is_file=True)
        return found
    try:
        return find_file(source, FILES[variant], revision)
    except RewardError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
    _refuse_other(source, variant, is_file=False)
    return None


def _refuse_other(name: str, variant: Variant, *, is_file: bool) -> None:
    """Raise if a name says that it is another variant's.

    A file named "HPS_v2" without more is v2. A folder or repository of that name may hold either.
    """
    found = re.search(r"hps[-_ ]?v?2(?:[._](\d))?(?!\d)", name, re.IGNORECASE)
    if found is None or (found[1] is None and not is_file):
        return
    named = "v2" if found[1] in (None, "0") else f"v2.{found[1]}"
    if named != variant:
        raise RewardError(
            f"the checkpoint {name!r} is HPS {named} by its name, but hps:{variant} was asked for, and their scores "
            f"are not comparable; ask for hps:{named}, or give the file {FILES[variant]!r} of {HUB}"
        )


def architecture_beside(file: Path) -> Mapping[str, Any]:
    """Return the `transformers.CLIPConfig` in a `config.json` beside a checkpoint, or that of CLIP ViT-H/14.

    Raises:
        RewardError: there is such a file, but it cannot be read.
    """
    beside = file.with_name("config.json")
    if not beside.is_file():
        return CLIP_VIT_H
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"cannot read {str(beside)!r}, which would say the architecture of {file.name!r}: {type(error).__name__}: "
            f"{error}. Repair it, or move it away if it belongs to another model."
        ) from error
    # Folders of downloads hold other models' configs too; the shapes of all tensors are checked in any case.
    return content if isinstance(content, dict) and content.get("model_type") == "clip" else CLIP_VIT_H
