"""Encodings of prompts: with their padding, as networks take them, and without it, as they are kept.

A family whose networks do not look at padded tokens names its masks: pairs of a tensor of its condition (`[N, tokens,
...]`) and the mask (`[N, tokens]`) that hides its padding. What stood in hidden places comes back as zeros: attention
gives it a weight of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from rdm_sdk.types import Condition, sent

Masks = Sequence[tuple[str, str]]
"""Tensors of a condition, each with the mask that hides its padding."""


def encoded(
    prompts: Sequence[str | None], encode: Callable[[list[str]], Condition], encode_nothing: Callable[[], Condition]
) -> Condition:
    """Return the encodings `[N, ...]` of prompts, which are encoded in one batch; None is no prompt."""
    texts = [prompt for prompt in prompts if prompt is not None]
    parts = [encode(texts)] if texts else []
    parts += [encode_nothing()] if len(texts) < len(prompts) else []
    place = iter(range(len(texts)))
    rows = [len(texts) if prompt is None else next(place) for prompt in prompts]
    return {name: torch.cat([part[name] for part in parts])[rows] for name in parts[0]}


def full_lengths(condition: Condition, masks: Masks) -> dict[str, int]:
    """Return how many tokens the tensors of a condition that have padding come with: those with a mask, and masks."""
    return {name: condition[name].shape[1] for pair in masks for name in pair}


def rows_without_padding(condition: Condition, masks: Masks) -> list[Condition]:
    """Return the rows of a condition `[N, ...]` on the CPU, cut behind the last token that the mask shows.

    A row whose mask hides everything is kept whole: its attention is spread over what is hidden.
    """
    moved = {name: tensor.detach().cpu() for name, tensor in condition.items()}
    rows = []
    for i in range(len(next(iter(moved.values())))):
        row = {name: tensor[i] for name, tensor in moved.items()}
        for name, mask in masks:
            shown = moved[mask][i].nonzero()
            if len(shown):
                last = int(shown[-1]) + 1
                row |= {name: row[name][:last], mask: row[mask][:last]}
        rows.append({name: tensor.clone() for name, tensor in row.items()})  # a view would hold all N in memory
    return rows


def padded(rows: Sequence[Condition], lengths: Mapping[str, int], device: torch.device) -> Condition:
    """Return rows as a condition `[N, ...]` on a device, padded with zeros to `lengths`; padding is not sent there."""
    condition = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name not in lengths:
            condition[name] = sent(torch.stack(tensors), device)
            continue
        together = sent(pad_sequence(tensors, batch_first=True), device)
        missing = lengths[name] - together.shape[1]
        condition[name] = nn.functional.pad(together, (*[0] * (2 * (together.ndim - 2)), 0, missing))
    return condition
