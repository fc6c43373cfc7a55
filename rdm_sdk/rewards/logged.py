"""What a reward logs of its samples, beside their scores: figures by name, one value per sample."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rdm_sdk.errors import RewardError, shown

TAKEN = ("mean", "std", "zero_std", "nan", "applies", "skipped", "seconds")
"""What a run logs of every reward under the same names."""
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")


def checked_figure(name: object, values: object, count: int) -> Tensor:
    """Return a figure of `count` samples, float32 `[N]`, NaN where there is none.

    Args:
        name: what the log calls it.
        values: a tensor, an array or a list with one entry per sample, None for no value; or a number for all of them.
        count: N.

    Raises:
        RewardError: the name is no word or is taken; the values are something else, or infinite.
    """
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise RewardError(
            f"log({shown(name, 60)}, ...): a figure's name is a word of letters, digits and '_', of at most 60"
        )
    if name in TAKEN:
        raise RewardError(f"log({name!r}, ...): a run logs that of every reward; take another name")
    try:
        if isinstance(values, (list, tuple)):
            values = [torch.nan if value is None else float(value) for value in values]
        elif isinstance(values, np.ndarray):
            values = values.tolist()
        figure = torch.as_tensor(values).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"log({name!r}, ...) takes numbers; got {shown(values, 80)}") from error
    if figure.ndim == 0:
        figure = figure.expand(count)
    if figure.shape != (count,):
        raise RewardError(
            f"log({name!r}, ...) takes a number, or one value per sample, shape [{count}]; got {list(figure.shape)}"
        )
    if bool(figure.isinf().any()):
        raise RewardError(f"log({name!r}, ...) was given an infinite number")
    return figure.clone()  # what the caller does to its tensor afterwards is no matter


def together(parts: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Return the figures of several batches of `counts` samples as those of all; NaN where a batch has none."""
    names = dict.fromkeys(name for part in parts for name in part)
    device = next((values.device for part in parts for values in part.values()), None)
    return {
        name: torch.cat(
            [
                part[name] if name in part else torch.full((count,), torch.nan, device=device)
                for part, count in zip(parts, counts, strict=True)
            ]
        )
        for name in names
    }
