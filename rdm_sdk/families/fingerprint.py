"""A hash by which a base is known again, and the first values of its weights."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

VALUES = 16
"""How many values of a tensor tell it from another."""


def note_first_values(network: nn.Module) -> None:
    """Let `first_values` know those of a network whose weights no process will hold whole any more."""
    noted = {name: first_values(network, name, parameter) for name, parameter in network.named_parameters()}
    object.__setattr__(network, "_noted_values", noted)


def first_values(network: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """Return the first `VALUES` values of a network's parameter of that name, float32 on the CPU."""
    noted: dict[str, Tensor] = getattr(network, "_noted_values", {})
    return noted[name] if name in noted else parameter.detach().flatten()[:VALUES].float().cpu()


def class_name(network: object) -> str:
    """Return the name of a network's class; sharing its weights out has put another before it."""
    return next(kind.__name__ for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))


def fingerprint(backbone: nn.Module) -> str:
    """Return a hash of a base's shapes and of samples of its weights, whatever adapters are on it."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        if "lora_" not in name:
            sample = first_values(backbone, name, parameter)
            digest.update(f"{name.replace('.base_layer', '')}{list(parameter.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
