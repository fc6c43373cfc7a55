"""The forward of a LoRA layer with fewer operations than PEFT's: the product with B is added where it is made."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


class LeanLinear(Linear):
    """PEFT's LoRA layer of an `nn.Linear`, for what these roles are: one plain adapter, or none.

    PEFT makes h B^T, scales it, and adds it to the base's output: three passes over a tensor of the output's size, of
    which small networks feel each. One `addmm` does it in a single one. Parameters, names and files are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s B A x, or W x where the adapter is off."""
        active = self.active_adapters
        lean = len(active) == 1 and not (self.disable_adapters or self.merged or args or kwargs)
        if lean and active[0] in self.lora_A and active[0] not in self.lora_variant:
            down: Any = self.lora_A[active[0]].weight
            up: Any = self.lora_B[active[0]].weight
            # A plan's tensors are on "meta", which has no autocast to ask for.
            autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
            if x.ndim > 1 and x.dtype == down.dtype and not autocast:
                network: Any = self.base_layer
                base: Tensor = network(x)
                hidden = functional.linear(x, down).flatten(0, -2)
                scale = self.scaling[active[0]]
                return torch.addmm(base.flatten(0, -2), hidden, up.t(), alpha=scale).view(base.shape)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


def lean(layer: Any) -> None:
    """Let a LoRA layer of PEFT's compute with fewer operations, if it is one of an `nn.Linear`."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LeanLinear
