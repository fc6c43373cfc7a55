"""From what a user names (a hub id, a path, a pipeline, an adapter) to a model adapter."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rdm_sdk.errors import ModelError
from rdm_sdk.models.base import ModelAdapter
from rdm_sdk.models.roles import check_finite

ADAPTERS = {
    "StableDiffusionPipeline": "rdm_sdk.models.sd:SDAdapter",
    "StableDiffusionXLPipeline": "rdm_sdk.models.sdxl:SDXLAdapter",
    "StableDiffusion3Pipeline": "rdm_sdk.models.sd3:SD3Adapter",
}
"""Pipeline classes to adapters, as dotted strings."""


def load_adapter(model: object, dtype: torch.dtype, **options: Any) -> ModelAdapter:
    """Return the adapter of a model, loading it first if it is named by a string.

    Args:
        model: a hub id, a local path, a loaded diffusers pipeline, or a `ModelAdapter` (returned as it is).
        dtype: the dtype of the base when it is loaded here; the VAE is always kept in float32, because half precision
            overflows in several families' decoders.
        options: passed to the adapter, such as `max_sequence_length`.

    Raises:
        ModelError: the base is missing, cannot be read, is of an unsupported family, or holds NaN weights.
    """
    if isinstance(model, ModelAdapter):
        _check_weights(model.pipeline)
        return model
    pipeline: Any = _load_pipeline(str(model), dtype) if isinstance(model, (str, Path)) else model
    name = type(pipeline).__name__
    if name not in ADAPTERS:
        raise ModelError(
            f"{name} is not supported. Pass a hub id, a local path or a pipeline of one of: {', '.join(ADAPTERS)}; "
            "or your own rdm_sdk.ModelAdapter (docs/models.md says how to write one)."
        )
    module, attribute = ADAPTERS[name].split(":")
    _check_weights(pipeline)
    adapter: ModelAdapter = getattr(import_module(module), attribute)(pipeline, **options)
    return adapter


def _check_weights(pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_finite(part, f"base model's {name}")


def _load_pipeline(source: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    path = Path(source).expanduser()
    if looks_local and not path.is_dir():
        raise ModelError(f"no base model at {source!r}: there is no such folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"no base model at {source!r}: the folder has no model_index.json, so it is no pipeline")
    try:
        return DiffusionPipeline.from_pretrained(
            str(path) if path.is_dir() else source, dtype={"default": dtype, "vae": torch.float32}
        )
    except Exception as error:
        raise ModelError(
            f"cannot load the base model {source!r}: {type(error).__name__}: {error}. Pass a hub id you have access "
            "to, or the path of a folder that DiffusionPipeline.from_pretrained can read."
        ) from error
