"""Light LoRA layers return the bits of PEFT's, forward and backward, and leave every other case to them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from rdm_sdk.families.lora_layers import LightLinear, lighten
from rdm_sdk.families.roles import Roles

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def layers(base: torch.dtype = torch.float32, alpha: int = 4, dropout: float = 0.0) -> tuple[Linear, Linear]:
    """Return PEFT's layer with the adapters "one" and "two", and a light one with the same weights."""
    made: list[Linear] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16)).to(base).requires_grad_(False)
        for name in ("one", "two"):
            config = LoraConfig(
                r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout
            )
            inject_adapter_in_model(config, model, adapter_name=name)
        layer = model[0]
        assert isinstance(layer, Linear)
        for name, parameter in layer.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        layer._active_adapter = ["two"]
        made.append(layer)
    lighten(made[1:])
    assert [type(layer) for layer in made] == [Linear, LightLinear]
    return made[0], made[1]


def results(layer: Linear, dtype: torch.dtype) -> list[Tensor]:
    """Return a layer's output for fixed inputs, and the gradients of inputs and adapters."""
    torch.manual_seed(1)
    x, direction = torch.randn(5, 7, 24).to(dtype).requires_grad_(), torch.randn(5, 7, 16)
    output = layer(x)
    adapters = [parameter for name, parameter in layer.named_parameters() if ".two." in name]
    gradients = torch.autograd.grad(output, [x, *adapters], direction.to(output.dtype), allow_unused=True)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("alpha", [4, 12])
@pytest.mark.parametrize(("base", "mixed"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_a_light_layer_returns_the_bits_of_pefts(alpha: int, base: str, mixed: bool) -> None:
    """With a scaling of 1 and another, float32 adapters on a half-precision base, and under autocast."""
    dtype = getattr(torch, base)
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        expected, got = (results(layer, dtype) for layer in layers(dtype, alpha))
    assert len(got) == len(expected) == 4
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", ["off", "both", "neither", "merged", "dropout"])
def test_other_cases_are_pefts_too(case: str) -> None:
    """No adapter, an unknown one, two at once, one that is merged into the base, and dropout."""
    pair = layers(dropout=0.5 if case == "dropout" else 0.0)
    for layer in pair:
        if case == "off":
            layer._disable_adapters = True
        elif case == "merged":
            layer.merge(adapter_names=["two"])
        elif case != "dropout":
            layer._active_adapter = {"both": ["one", "two"], "neither": ["three"]}[case]
    expected, got = (results(layer, torch.float32) for layer in pair)
    assert len(got) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_roles_are_made_of_light_layers() -> None:
    """Whichever adapter came last."""
    roles = Roles(nn.Sequential(nn.Linear(8, 8)))
    for name in ("student", "fake"):
        roles.add_role(name, LoraConfig(r=2, target_modules=["0"]))
        assert [type(layer) for layer in roles._layers] == [LightLinear]
