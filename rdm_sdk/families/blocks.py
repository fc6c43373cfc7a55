"""The backbone's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def middle(blocks: Sequence[nn.Module] | nn.ModuleList) -> nn.Module:
    """Return the middle one of a backbone's blocks, the earlier of two."""
    return blocks[(len(blocks) - 1) // 2]
