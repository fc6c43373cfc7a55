"""How times and sampling steps are spread over a batch of groups: where variance can be saved for nothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Spread = Literal["stratified", "shared", "free"]
"""Over the samples of a group: "stratified" spreads them evenly over the range, "shared" gives all of them one value,
"free" draws each by itself (DMD2). Whatever the choice, each sample's own value is uniform on the range."""


def draw_uniform(spread: Spread, num_groups: int, group_size: int, device: torch.device) -> Tensor:
    """Draw numbers uniform in [0, 1), `[N]`, group-major.

    "stratified" puts one sample of each group into each of `group_size` equal intervals, and the samples of an interval
    into `num_groups` equal parts of it: a Latin square over groups and batch. "shared" spreads the groups evenly.
    """
    if spread == "free":
        return torch.rand(num_groups * group_size, device=device)
    if spread == "shared":
        return _strata(1, num_groups, device)[0].repeat_interleave(group_size)
    interval = torch.rand(num_groups, group_size, device=device).argsort(1)  # of each sample, within its group
    inside = _strata(group_size, num_groups, device).T  # [num_groups, group_size]: where in each interval
    return ((interval + inside.gather(1, interval)) / group_size).flatten()


def draw_steps(spread: Spread, num_groups: int, group_size: int, num_steps: int, device: torch.device) -> Tensor:
    """Draw the step that each sample is trained at, int64 `[N]`, each uniform in [0, num_steps).

    "stratified" visits the steps in turn inside each group, from a first step that the groups share out evenly;
    "shared" gives each group one step, shared out evenly too.
    """
    if spread == "free":
        return torch.randint(num_steps, (num_groups * group_size,), device=device)
    stride = 1 if spread == "shared" else group_size  # a group's steps begin where those of the one before end
    first = (stride * torch.arange(num_groups, device=device) + torch.randint(num_steps, (), device=device)) % num_steps
    first = first[torch.randperm(num_groups, device=device)]
    if spread == "shared":
        return first.repeat_interleave(group_size)
    turns = torch.rand(num_groups, group_size, device=device).argsort(1)
    return ((first[:, None] + turns) % num_steps).flatten()


def _strata(rows: int, count: int, device: torch.device) -> Tensor:
    """Return `[rows, count]` numbers, one in each of `count` equal parts of [0, 1) per row, in random order."""
    order = torch.rand(rows, count, device=device).argsort(1)
    return (order + torch.rand(rows, count, device=device)) / count
