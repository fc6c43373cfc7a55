"""A pipeline without its weights: every module on the meta device, built from the configs alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from rdm_sdk.errors import ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import explained, family_class, find_folder

CONFIGS = ("model_index.json", "*/config.json", "*/scheduler_config.json")
"""What is downloaded of a hub repository."""


def blueprint(model: object, dtype: torch.dtype, **options: Any) -> ModelFamily:
    """Return the family of a model whose modules have shapes and dtypes, but no weights.

    They are those that `load_family` would load: the base and the text encoders in `dtype`, the VAE in float32.
    Nothing but JSON files is read; tokenizers are left out, so prompts cannot be encoded.

    Args:
        model: a hub id or a local path.
        dtype: the dtype of the base.
        options: passed to the family, such as `max_sequence_length`.

    Raises:
        ModelError: there is no such model, the hub cannot be reached, the family is not supported, or a config is
            broken.
    """
    if not isinstance(model, (str, Path)):
        raise ModelError(
            f"a model is planned from its configs, so pass its hub id or the path of its folder; got a "
            f"{type(model).__name__}"
        )
    folder = find_folder(str(model))
    if folder is None:
        hint = "Pass a hub id you have access to, check the connection, or pass the path of a local folder."
        with explained(f"reach the hub for the configs of {str(model)!r}", hint):
            folder = Path(huggingface_hub.snapshot_download(str(model), allow_patterns=list(CONFIGS)))
    with explained(f"read {str(folder / 'model_index.json')!r}", "Is it a whole pipeline's?"):
        index: dict[str, Any] = dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    family = family_class(str(index.get("_class_name")))
    hint = "Is every component's config.json there, and are diffusers and transformers new enough for them?"
    with explained(f"build the pipeline in {str(folder)!r} from its configs", hint), torch.no_grad():
        kind: Any = getattr(diffusers, index["_class_name"])
        parts = {
            name: _part(folder, name, value, torch.float32 if name == "vae" else dtype)
            for name, value in index.items()
            if isinstance(value, list) and not name.startswith("_")
        }
        settings = {name: value for name, value in kind.extract_init_dict(dict(index))[0].items() if name not in parts}
        pipeline = kind(**parts, **settings)
        pipeline.register_to_config(_name_or_path=str(model))
    made = family(pipeline, **options)
    made.device = torch.device("meta")
    return made


class NoTokenizer:
    """Stands where a pipeline's tokenizer, or another part that is no module, would, which needs more than a config."""

    model_max_length = 77  # pipelines copy it when they are made; nothing is ever tokenized


def _part(folder: Path, name: str, named: Sequence[str | None], dtype: torch.dtype) -> Any:
    """Return one component of a pipeline; `named` is what `model_index.json` has for it, a library and a class."""
    library, kind = named
    if library is None or kind is None:
        return None
    cls: Any = simple_get_class_obj(library, kind)
    if not issubclass(cls, nn.Module):
        is_scheduler = (folder / name / "scheduler_config.json").is_file()
        return cls.from_config(cls.load_config(folder / name)) if is_scheduler else NoTokenizer()
    if not (folder / name / "config.json").is_file():  # transformers would take its defaults
        raise FileNotFoundError(f"there is no {name}/config.json")
    with torch.device("meta"), local_torch_dtype(dtype):
        if library == "transformers" or not hasattr(cls, "load_config"):
            module: nn.Module = cls(cls.config_class.from_pretrained(folder / name))
        else:
            module = cls.from_config(cls.load_config(folder / name))
    # What a file would hold is cast, as by `from_pretrained`; buffers that no file holds stay as they are made.
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module
