"""Networks that `torch.compile` has wrapped, and networks that are compiled under their roles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rdm_sdk.errors import ConfigError, nearest

VARIANTS = 64
"""How many times a network may be compiled: once per role, with gradients and without, and shape of its inputs."""


def compiled_in_place(pipeline: Any, component: str) -> Any:
    """Return a pipeline's component without the wrapper that `torch.compile(module)` returns.

    The wrapper puts `_orig_mod.` before the names of all parameters, and so of a student's, which no other program
    would find. The module itself, compiled with the wrapper's own options as `module.compile()` does it, takes its
    place in the pipeline.
    """
    module = getattr(pipeline, component)
    inner = getattr(module, "_orig_mod", None)
    if inner is None:
        return module
    inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)
    setattr(pipeline, component, inner)
    return inner


def compile_networks(networks: Iterable[nn.Module], backend: str, mode: str | None) -> None:
    """Compile networks in place, each when it is first called: names of parameters, and so files, stay as they are.

    What is compiled holds for one role, one shape of inputs and with or without gradients; another is compiled anew.
    Kernels for any shape would take less compiling, but which of them runs, and so the last bits of what it returns,
    would depend on the shapes seen before: a resumed run would not repeat the uninterrupted one.

    Args:
        networks: the backbone with all its adapters, and full copies of it.
        backend: as `torch.compile` knows it.
        mode: of the backend "inductor"; None is its default.
    """
    limits: Any = torch._dynamo.config
    # PyTorch's limit of 8 is for functions whose inputs are other ones every time; beyond it nothing is compiled.
    limits.cache_size_limit = max(limits.cache_size_limit, VARIANTS)
    buffers: Any = torch._functorch.config
    buffers.donated_buffer = False  # a tilt walks through the teacher's graph once per reward
    for network in networks:
        network.compile(backend=backend, mode=mode, dynamic=False)


def compiling_seconds() -> float:
    """Return the seconds that this process has spent compiling, backward passes included."""
    total: float = torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
    return total


def check_compiler(backend: str, mode: str | None, device: torch.device) -> None:
    """Compile a sum on a device, so that a missing compiler is found before a model is loaded.

    Raises:
        ConfigError: there is no such backend, it has no modes, or it does not work here.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"torch_compile_backend={backend!r}: PyTorch has no such backend.{nearest(backend, known)} There are: "
            f"{', '.join(known)}"
        )
    if mode is not None and backend != "inductor":
        raise ConfigError(
            f"torch_compile_mode={mode!r} is one of the backend 'inductor', and torch_compile_backend={backend!r}; "
            "leave one of them out"
        )
    trial: Any = torch.compile(lambda values: values + 1, backend=backend, mode=mode, dynamic=False)
    try:
        trial(torch.zeros(2, device=device))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"torch_compile: the backend {backend!r} does not work here: {reason}. Install what it needs (on a CPU, a "
            "C++ compiler), or leave torch_compile out"
        ) from error
