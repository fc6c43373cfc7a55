"""A frozen base that the processes of a run hold together: each a part of every layer, put together for its passes."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.fingerprint import note_first_values


def shard_base(family: ModelFamily, device: torch.device) -> None:
    """Share the base of a family out between all processes (PyTorch's FSDP2), in place.

    Of every base weight a process keeps its part; a block's weights are put together on `device` for each of its
    passes, forward and backward, and let go after it. Adapters are left whole on every process: they are small, and
    whoever reads, averages, saves or exports them finds them where they were. Text encoders and VAE stay whole too.
    Every process must from then on run the backbone as often as the others, in the same order.

    Args:
        family: with its roles added, none of which is a copy of the base.
        device: where this process computes.

    Raises:
        ConfigError: the base is in no state to be shared out.
        ModelError: it is of a class that does not name its blocks.
    """
    backbone = family.backbone
    _check(family)
    blocks = blocks_of(backbone)
    note_first_values(backbone)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {parameter for parameter in backbone.parameters() if parameter.requires_grad}
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": trained}
    # A block's output may be a view, into which nobody must write; diffusers' networks do not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for part in (*blocks, backbone):
        fully_shard(part, **options)
    family._typical = torch.empty(0, dtype=family.dtype)  # the other was one of the base's weights, whole
    family.roles.sharded = True


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks with frozen weights that the backbone names as not to be split, inner ones first.

    Raises:
        ModelError: there are none.
    """
    # Some name embedders and norms too, which are small.
    names = [name for name in getattr(backbone, "_no_split_modules", None) or () if "Block" in name]
    found = [module for module in backbone.modules() if type(module).__name__ in names]
    blocks = [module for module in found if any(not p.requires_grad for p in module.parameters())]
    if not blocks:
        raise ModelError(
            f"fsdp: {type(backbone).__name__} names no blocks (_no_split_modules), of which one at a time would be put "
            "together; leave fsdp out"
        )
    return blocks[::-1]


def _check(family: ModelFamily) -> None:
    """Raise `ConfigError` if a base cannot be shared out."""
    backbone = family.backbone
    why = {
        "its layers are in few bits": getattr(backbone, "hf_quantizer", None),
        "it is spread over devices": getattr(backbone, "hf_device_map", None),
        "it is offloaded": getattr(backbone, "_hf_hook", None),
        "it is compiled": getattr(backbone, "_compiled_call_impl", None),
        "a role is a full copy of it": len(family.roles.copies),
    }
    for reason, holds in why.items():
        if holds:
            raise ConfigError(f"fsdp shares out a base that is whole, and of {family.base_name!r} {reason}")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"fsdp needs a newer PyTorch than {torch.__version__}, such as 2.13")
