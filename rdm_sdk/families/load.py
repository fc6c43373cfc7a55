"""From what a user names (a hub id, a path, a pipeline, a family) to a model family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import check_finite
from rdm_sdk.files import looks_local
from rdm_sdk.plugins.registry import registry

Quantization = Literal["none", "8bit", "4bit"]


def family_class(pipeline: str) -> type[ModelFamily]:
    """Return the family for pipelines of a class, the SDK's own or a plugin's.

    Raises:
        ModelError: there is none, or it cannot be used; says what is supported and how to add a family.
    """
    found = registry().load_model(pipeline)
    if not (isinstance(found, type) and issubclass(found, ModelFamily)):
        raise ModelError(f"the family registered for {pipeline} is {found!r}; it must subclass rdm_sdk.ModelFamily")
    return found


def load_family(model: object, dtype: torch.dtype, quantization: Quantization = "none", **options: Any) -> ModelFamily:
    """Return the family of a model, loading it first if it is named by a string.

    Args:
        model: a hub id, a local path, a loaded diffusers pipeline, or a `ModelFamily` (returned as it is).
        dtype: the dtype of the base when it is loaded here; the VAE is always kept in float32, because half precision
            overflows in several families' decoders.
        quantization: of the backbone when it is loaded here, with bitsandbytes; layers are computed in `dtype`.
        options: passed to the family, such as `max_sequence_length`.

    Raises:
        ConfigError: a loaded pipeline cannot be quantized any more, or bitsandbytes is missing.
        ModelError: the base is missing, cannot be read, is of an unsupported family, or holds NaN weights.
    """
    named = isinstance(model, (str, Path))
    if quantization != "none" and not named:
        raise ConfigError(
            f"quantization={quantization!r} acts when the base is loaded, and model is a {type(model).__name__} "
            "already; pass its name or path, or load it with a diffusers quantization_config of your own"
        )
    if isinstance(model, ModelFamily):
        _check_weights(model.pipeline)
        return model
    pipeline: Any = load_pipeline(str(model), dtype, quantization) if named else model
    family = family_class(type(pipeline).__name__)
    _check_weights(pipeline)
    return family(pipeline, **options)


def find_folder(source: str) -> Path | None:
    """Return the folder of a model that is named by its path, None for one that must be a hub id.

    Raises:
        ModelError: there is no such folder, or no pipeline in it.
    """
    path = Path(source).expanduser()
    if looks_local(source) and not path.is_dir():
        raise ModelError(f"no base model at {source!r}: there is no such folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"no base model at {source!r}: the folder has no model_index.json, so it is no pipeline")
    return path if path.is_dir() else None


def _check_weights(pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_finite(part, f"base model's {name}")


def load_pipeline(source: str, dtype: torch.dtype, quantization: Quantization = "none") -> Any:
    """Return the pipeline that a hub id or a path names, its VAE in float32; raises as `load_family`."""
    from diffusers import DiffusionPipeline

    place, what = str(find_folder(source) or source), f"load the base model {source!r}"
    hint = "Pass a hub id you have access to, or the path of a folder that DiffusionPipeline.from_pretrained can read."
    with explained(what, hint):
        index: dict[str, Any] = DiffusionPipeline.load_config(place)
    family = family_class(str(index["_class_name"]))  # an unsupported family is refused before its weights are read
    extra = {} if quantization == "none" else {"quantization_config": _quantized(family.component, dtype, quantization)}
    with explained(what, hint):
        return DiffusionPipeline.from_pretrained(place, dtype={"default": dtype, "vae": torch.float32}, **extra)


@contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """Turn whatever happens in the block into a `ModelError`: it cannot do `what`, and what to do instead."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"cannot {what}: {type(error).__name__}: {error}. {hint}") from error


def _quantized(component: str, dtype: torch.dtype, quantization: Quantization) -> Any:
    """Return what loads one component in few bits: LLM.int8 (arXiv 2208.07339) or QLoRA's NF4 (2305.14314)."""
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    if not torch.cuda.is_available():
        raise ConfigError(f"quantization={quantization!r} needs a CUDA device, and there is none; use 'none'")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization={quantization!r} needs bitsandbytes: pip install 'rdm-sdk[quantization]'")
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{quantization}", quant_kwargs=options, components_to_quantize=[component]
    )
