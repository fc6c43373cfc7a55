"""Which base a student belongs to: written beside its weights, and checked before a pipeline takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from rdm_sdk.errors import ModelError
from rdm_sdk.families.fingerprint import class_name, first_values
from rdm_sdk.families.targets import adapters_of

BASE = "base.json"
"""The file of an export that describes the base."""
PEFT_FOLDER = "peft"
PEFT_FILE = "adapter_model.safetensors"
PEFT_WEIGHTS = f"{PEFT_FOLDER}/{PEFT_FILE}"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of an adapter's tensors."""
TENSORS = 24
"""How many of the base's tensors are sampled."""
CLOSE = 0.005
"""Relative difference of a sampled tensor up to which it is the same in another precision (bfloat16: 0.002)."""
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` reads, of the pipelines that have it."""
_COPY = re.compile(r"config\.json|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""What diffusers writes of a full copy into its component's folder."""

Weights = Literal["lora", "full"]


class _Base(BaseModel):
    """What `base.json` holds."""

    pipeline: str
    component: Literal["transformer", "unet"]
    network: str
    prediction: str
    weights: Weights
    config: dict[str, Any]
    samples: dict[str, list[float]]


def read_base(folder: Path) -> dict[str, Any]:
    """Return what an export says of its base; raises `ModelError` if that cannot be read."""
    try:
        return _Base.model_validate(read_json(folder, BASE)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{BASE} in {str(folder)!r} is damaged: {where}: {first['msg']}; copy it again") from error


def source_of(pipeline: Any) -> str | None:
    """Return the hub id or path that loads a base as it is; None where it was put together or changed in memory."""
    if getattr(pipeline, "num_fused_loras", 0):  # diffusers counts them, and goes on when they are unloaded
        return None
    return str(pipeline.config.get("_name_or_path") or "") or None


def exported_weights(folder: Path) -> list[Path]:
    """Return the files of weights that an export wrote into a folder, none where no readable `base.json` says which.

    Without that they might be anybody's. Of a folder that holds a whole pipeline, they are the pipeline's.
    """
    if (folder / "model_index.json").exists():
        return []
    try:
        base = read_base(folder)
    except ModelError:
        return []
    if base["weights"] == "lora":
        files = [folder / WEIGHTS, *(folder / PEFT_FOLDER / name for name in ("adapter_config.json", PEFT_FILE))]
        return [path for path in files if path.is_file()]
    return [path for path in (folder / base["component"]).glob("*") if path.is_file() and _COPY.fullmatch(path.name)]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of an export; raises `ModelError` if it is missing or damaged."""
    if not (folder / name).is_file():
        raise ModelError(f"{folder} has no {name}, so it is no student; give the folder that training saved")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} in {str(folder)!r} is damaged: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name} in {str(folder)!r} is damaged: it holds no object; copy it again")
    return content


def describe_base(pipeline: Any, component: str, weights: Weights) -> dict[str, Any]:
    """Return what is kept of a student's base, as JSON: classes, kind of prediction, config and sampled weights.

    Adapters on the pipeline are left out; `component` is what of it was trained, such as "transformer".
    """
    network = getattr(pipeline, component)
    return {
        "pipeline": type(pipeline).__name__,
        "component": component,
        "network": class_name(network),
        "prediction": _prediction(pipeline.scheduler),
        "weights": weights,
        "config": _config(network),
        "samples": _samples(network),
    }


def check_base(pipeline: Any, base: Mapping[str, Any], folder: Path, other_base: bool) -> None:
    """Raise `ModelError` unless a pipeline is the base that `describe_base` described.

    `folder` is the student's, for messages; `other_base` takes another config and other weights too, but not another
    kind of network or of prediction.
    """
    network = network_of(pipeline, base["component"])
    names = adapters_of(network) if isinstance(network, nn.Module) else []
    if type(network).__name__ != base["network"]:
        raise ModelError(
            f"the student in {str(folder)!r} is for a {base['pipeline']} with a {base['network']}; got a "
            f"{type(pipeline).__name__} with {type(network).__name__}. Load the base that it was trained on"
        )
    if names:
        raise ModelError(
            f"the pipeline's {base['component']} has adapters already: {', '.join(map(repr, names))}. Load the student "
            "into a pipeline without any; other LoRAs can be loaded after it"
        )
    prediction = _prediction(pipeline.scheduler)
    if prediction != base["prediction"]:
        raise ModelError(
            f"the student in {str(folder)!r} predicts {base['prediction']!r}, and this {type(pipeline).__name__} "
            f"{prediction!r}, as its scheduler says. Load the base that it was trained on"
        )
    differences = _differences(network, base)
    if differences and not other_base:
        raise ModelError(
            f"the student in {str(folder)!r} was trained on another base than this {type(pipeline).__name__}: "
            f"{'; '.join(differences)}. Load the base that it was trained on; to try it on another of its family, "
            "pass other_base=True"
        )


def network_of(pipeline: Any, component: str) -> Any:
    """Return a pipeline's component, without a `torch.compile` wrapper; None where there is none."""
    network = getattr(pipeline, component, None)
    return getattr(network, "_orig_mod", network)


def check_adapters_fit(network: nn.Module, file: Path, component: str) -> None:
    """Raise `ModelError` unless every tensor of a LoRA file has a layer of its shape in a network.

    The file is in PEFT's format or in diffusers', which calls the network `component`; only names and shapes are read.
    """
    layers = dict(network.named_modules())
    odd = []
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                prefix = next((p for p in (PEFT_PREFIX, f"{component}.") if name.startswith(p)), "")
                layer, _, side = name.removeprefix(prefix).removesuffix(".weight").rpartition(".")
                if layer not in layers or not _fits(layers[layer], side, tensors.get_slice(name).get_shape()):
                    odd.append(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the student's weights in {str(file)!r} cannot be read: {error}") from error
    if odd or not names:
        raise ModelError(
            f"the student's weights in {str(file)!r} do not fit this {type(network).__name__}: {len(odd)} of "
            f"{len(names)} tensors have no layer of their shape{f', first {odd[0]!r}' if odd else ''}. Load the base "
            "that it was trained on"
        )


def _fits(layer: nn.Module, side: str, shape: list[int]) -> bool:
    """Return whether a LoRA tensor fits a layer: "lora_A" its inputs, "lora_B" its outputs."""
    conv = isinstance(layer, nn.Conv2d)
    if side == "lora_A":
        return len(shape) > 1 and shape[1] == (layer.in_channels if conv else getattr(layer, "in_features", shape[1]))
    if side == "lora_B":
        return len(shape) > 1 and shape[0] == (layer.out_channels if conv else getattr(layer, "out_features", shape[0]))
    return True


def _prediction(scheduler: Any) -> str:
    """Return what a scheduler takes its network to predict: "flow", or what diffusers calls it."""
    kind = scheduler.config.get("prediction_type")
    return "flow" if kind in (None, "flow_prediction") else str(kind)


def _config(network: Any) -> dict[str, Any]:
    """Return a network's settings without those that say where it came from or how it was loaded."""
    kept = {}
    for name, value in dict(getattr(network, "config", {})).items():
        if not name.startswith("_") and name != "quantization_config":
            kept[name] = json.loads(json.dumps(value, default=str))
    return kept


def _samples(network: nn.Module) -> dict[str, list[float]]:
    """Return the first values of tensors that are spread over a network, by name; packed ones are left out."""
    plain = {n: p for n, p in network.named_parameters() if "lora_" not in n and p.dtype in _PLAIN and not p.is_meta}
    names = [name for name, parameter in plain.items() if parameter.ndim > 1] or list(plain)
    chosen = names[:: max(1, len(names) // TENSORS)][:TENSORS]
    return {name.replace(".base_layer", ""): first_values(network, name, plain[name]).tolist() for name in chosen}


def _differences(network: Any, base: Mapping[str, Any]) -> list[str]:
    """Return what is other about a network than about the base, in words; of a full copy, weights do not count."""
    config = _config(network)
    found = [
        f"its {name} is {value!r}, and {config[name]!r} here"
        for name, value in base["config"].items()
        if name in config and config[name] != value
    ]
    if base["weights"] == "full":
        return found
    parameters, other = dict(network.named_parameters()), []
    for name, values in base["samples"].items():
        parameter, wanted = parameters.get(name), torch.tensor(values)
        if parameter is not None and (parameter.dtype not in _PLAIN or parameter.is_meta):
            continue  # packed into few bits, or not in memory: there is nothing to compare
        have = torch.empty(0) if parameter is None else first_values(network, name, parameter)
        if have.shape != wanted.shape or (have - wanted).norm() > CLOSE * wanted.norm() + 1e-6:
            other.append(name)
    if other:
        found.append(f"{len(other)} of {len(base['samples'])} sampled tensors differ, first {other[0]!r}")
    return found
