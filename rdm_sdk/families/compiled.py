"""Networks that `torch.compile` has wrapped."""

from __future__ import annotations

from typing import Any


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
