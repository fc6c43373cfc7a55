"""LoRA layers that return what PEFT's return, to the last bit, and go over their output once instead of thrice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor


class LightLinear(Linear):
    """PEFT's linear layer, for the case that training is made of: one adapter, not merged into the base, or none.

    What the adapter adds goes into the base layer's output in place, and is not multiplied by a scaling of 1. A network
    of narrow layers spends as long on these two passes and on looking for options as on the adapters' products.
    Everything else is left to PEFT.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or self.lora_variant or len(names) != 1:
            given: Tensor = super().forward(x, *args, **kwargs)
            return given
        (name,) = names
        if name not in self.lora_A:
            base: Tensor = self.base_layer(x)
            return base
        down: Any = self.lora_A[name]
        scaling = self.scaling[name]
        result: Tensor = self.base_layer(x)
        added: Tensor = self.lora_B[name](down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype))))
        # In place, a sum in float32 is rounded to the result's dtype as PEFT rounds it afterwards.
        return result.add_(added if scaling == 1 else added * scaling)


def lighten(layers: Iterable[object]) -> None:
    """Turn PEFT's linear LoRA layers into light ones, in place; layers of other kinds (quantized ones) stay."""
    for layer in layers:
        if type(layer) is Linear:
            layer.__class__ = LightLinear
