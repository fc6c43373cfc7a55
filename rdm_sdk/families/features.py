"""What a block inside a network makes of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def middle(blocks: Sequence[nn.Module] | nn.ModuleList) -> nn.Module:
    """Return the middle one of a backbone's blocks, the earlier of two."""
    return blocks[(len(blocks) - 1) // 2]


def block_output(network: nn.Module, block: nn.Module, run: Callable[..., object], *inputs: object) -> Tensor:
    """Run a network, and return the output of one of its blocks as tokens `[N, tokens, C]` (float32), with its graph.

    Args:
        network: the network.
        block: the block; its output, or the last of its outputs, is `[N, tokens, C]` or a map `[N, C, h, w]`. If it
            runs several times, the first counts.
        run: runs the network.
        inputs: what it is called with.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found = output if isinstance(output, Tensor) else output[-1]
        seen.append(found.flatten(2).transpose(1, 2) if found.ndim == 4 else found)

    handle = block.register_forward_hook(keep)
    try:
        # A compiled network would not see the hook.
        with torch.compiler.set_stance("force_eager"):
            run(*inputs)
    finally:
        handle.remove()
    features = seen[0].float()
    if isinstance(network, FSDPModule) and features.requires_grad:
        features.register_hook(partial(_put_together, network))
    return features


def _put_together(network: FSDPModule, gradient: Tensor) -> None:
    """Put together what of a network is in none of its blocks, whose backward pass does not begin at its output."""
    network.unshard()
