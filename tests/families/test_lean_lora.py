"""LoRA layers compute what PEFT's do, with fewer operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_sdk.families.lean_lora import LeanLinear
from rdm_sdk.families.roles import STUDENT, Roles


class Net(nn.Module):
    """One linear layer, called as backbones are."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6, dtype=dtype)

    def forward(self, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(x),)


def roles_of(dtype: torch.dtype = torch.float32) -> tuple[Roles, LeanLinear]:
    """Return roles with a student whose adapter does something, and the layer."""
    torch.manual_seed(0)
    roles = Roles(Net(dtype))
    roles.add_role(STUDENT, LoraConfig(r=3, lora_alpha=6, target_modules=["layer"]))
    roles.add_role("fake", LoraConfig(r=2, target_modules=["layer"]))
    for parameter in roles.parameters_of(STUDENT).values():
        nn.init.normal_(parameter)
    layer = roles.backbone.layer
    assert isinstance(layer, LeanLinear)
    return roles, layer


def results(roles: Roles, x: Tensor) -> list[Tensor]:
    """Return the student's output, and its gradients in x and the adapter."""
    x = x.clone().requires_grad_()
    output = roles(STUDENT, x=x)
    gradients = torch.autograd.grad(output.float().square().sum(), [x, *roles.parameters_of(STUDENT).values()])
    return [output, *gradients]


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 0, 8)])
def test_it_is_pefts_layer(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, for inputs of any shape; the teacher is the base, bit for bit."""
    roles, layer = roles_of()
    x = torch.randn(shape)
    mine = results(roles, x)
    teacher = roles("teacher", x=x)
    assert torch.equal(teacher, layer.base_layer(x))
    monkeypatch.setattr(LeanLinear, "forward", Linear.forward)
    for one, other in zip(mine, results(roles, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_other_precisions_are_left_to_peft() -> None:
    """A bfloat16 base, whose adapters are float32, with and without autocast: the same bits."""
    roles, layer = roles_of(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), roles.use(STUDENT):
            assert torch.equal(layer(x), Linear.forward(layer, x))


def test_a_plan_runs_it_too() -> None:
    """On the device that has shapes alone."""
    roles, layer = roles_of()
    roles.to("meta")
    with roles.use(STUDENT):
        assert layer(torch.empty(2, 8, device="meta")).shape == (2, 6)


def test_fewer_operations() -> None:
    """Three products, in place of three, a scaling and a sum."""

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Callable[..., object], types: object, args: tuple = (), kwargs=None):  # type: ignore[no-untyped-def,type-arg]
            self.names.append(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    roles, _ = roles_of()
    with Counting() as counting, torch.no_grad():
        roles(STUDENT, x=torch.randn(2, 5, 8))
    work = [name for name in counting.names if name in ("mm", "addmm", "bmm", "mul", "add", "linear")]
    assert sorted(work) == ["addmm", "addmm", "mm"]
