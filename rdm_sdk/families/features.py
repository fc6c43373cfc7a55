"""What a block inside a network makes of its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def block_output(block: nn.Module, run: Callable[[], object]) -> Tensor:
    """Run a network, and return the output of one of its blocks as tokens `[N, tokens, C]` (float32), with its graph.

    Args:
        block: the block; its output, or the last of its outputs, is `[N, tokens, C]` or a map `[N, C, h, w]`. If it
            runs several times, the first counts.
        run: runs the network that the block is part of.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found = output if isinstance(output, Tensor) else output[-1]
        seen.append(found.flatten(2).transpose(1, 2) if found.ndim == 4 else found)

    handle = block.register_forward_hook(keep)
    try:
        # A compiled network would not see the hook.
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        handle.remove()
    return seen[0].float()
