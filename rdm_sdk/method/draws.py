"""Random numbers of a batch: where on several processes they come from, and how times and steps are spread over groups.

Spread evenly, they save variance for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_sdk.types import sent

Spread = Literal["stratified", "shared", "free"]
"""Over the samples of a group: "stratified" spreads them evenly over the range, "shared" gives all of them one value,
"free" draws each by itself (DMD2). Whatever the choice, each sample's own value is uniform on the range."""


@dataclass
class Draws:
    """Where the random numbers of a process's samples come from: drawn for the samples of all processes, and cut out.

    What a sample meets thus depends on its place in the whole batch alone, not on how many processes share it. Every
    process has as many samples, makes the same draws in the same order, and the generators of all are in one state.
    """

    index: int = 0
    """Which process this is, from 0; its samples come in that order."""
    count: int = 1
    """How many there are."""
    generator: torch.Generator | None = None
    """On the samples' device; None is PyTorch's global one."""

    def mine(self, values: Tensor) -> Tensor:
        """Return this process's rows of `values` `[count N, ...]`, which are of all processes."""
        return values.chunk(self.count)[self.index] if self.count > 1 else values

    def normal(self, count: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw standard normal numbers for `count` samples of each process; return this one's, `[count, *shape]`."""
        return self.mine(torch.randn(self.count * count, *shape, generator=self.generator, device=device))

    def normal_for(
        self, chosen: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw standard normal numbers for some of all processes' samples.

        Args:
            chosen: for which ones, bool `[count N]`; on the CPU, nobody waits for the device.
            shape: of one sample.
            dtype: of the numbers.
            device: of the generator and the numbers; None is that of `chosen`.

        Returns:
            This process's rows among them, int64 `[n]`, and their numbers, `[n, *shape]`.
        """
        device = chosen.device if device is None else device
        chosen = chosen.cpu()
        rows = sent(self.mine(chosen).nonzero()[:, 0], device)
        sizes = [len(rows)] if self.count == 1 else chosen.reshape(self.count, -1).sum(1).tolist()
        numbers = torch.randn(sum(sizes), *shape, generator=self.generator, device=device, dtype=dtype)
        return rows, numbers.split(sizes)[self.index]


def draw_uniform(
    spread: Spread, num_groups: int, group_size: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw numbers uniform in [0, 1), `[N]`, group-major.

    "stratified" puts one sample of each group into each of `group_size` equal intervals, and the samples of an interval
    into `num_groups` equal parts of it: a Latin square over groups and batch. "shared" spreads the groups evenly.
    """
    if spread == "free":
        return torch.rand(num_groups * group_size, generator=generator, device=device)
    if spread == "shared":
        return _strata(1, num_groups, device, generator)[0].repeat_interleave(group_size)
    # The interval of each sample, within its group.
    interval = torch.rand(num_groups, group_size, generator=generator, device=device).argsort(1)
    inside = _strata(group_size, num_groups, device, generator).T  # [num_groups, group_size]: where in each interval
    return ((interval + inside.gather(1, interval)) / group_size).flatten()


def draw_steps(
    spread: Spread,
    num_groups: int,
    group_size: int,
    num_steps: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the step that each sample is trained at, int64 `[N]`, each uniform in [0, num_steps).

    "stratified" visits the steps in turn inside each group, from a first step that the groups share out evenly;
    "shared" gives each group one step, shared out evenly too.
    """
    if spread == "free":
        return torch.randint(num_steps, (num_groups * group_size,), generator=generator, device=device)
    stride = 1 if spread == "shared" else group_size  # a group's steps begin where those of the one before end
    start = torch.randint(num_steps, (), generator=generator, device=device)
    first = (stride * torch.arange(num_groups, device=device) + start) % num_steps
    first = first[torch.randperm(num_groups, generator=generator, device=device)]
    if spread == "shared":
        return first.repeat_interleave(group_size)
    turns = torch.rand(num_groups, group_size, generator=generator, device=device).argsort(1)
    return ((first[:, None] + turns) % num_steps).flatten()


def _strata(rows: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return `[rows, count]` numbers, one in each of `count` equal parts of [0, 1) per row, in random order."""
    order = torch.rand(rows, count, generator=generator, device=device).argsort(1)
    return (order + torch.rand(rows, count, generator=generator, device=device)) / count
