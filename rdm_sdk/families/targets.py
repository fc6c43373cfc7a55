"""Which layers of a network get LoRA adapters, and which networks have some already."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from rdm_sdk.errors import ConfigError, ModelError


def adapters_of(network: nn.Module) -> list[str]:
    """Return the names of the adapters that a network has, switched on or off, merged or not."""
    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    return list(
        dict.fromkeys(n for layer in layers for kind in layer.adapter_layer_names for n in getattr(layer, kind))
    )


def names_of_adapted(network: nn.Module, adapter: str) -> list[str] | None:
    """Return names that say which layers of a network have an adapter, sorted; None where they would say others too.

    A list of names is also one of endings: "proj_out" is a layer of the network and each of its blocks' of that name.
    """
    layers = {name: layer for name, layer in network.named_modules() if ".lora_" not in name}
    adapted = sorted(
        name
        for name, layer in layers.items()
        if isinstance(layer, BaseTunerLayer)
        and any(adapter in getattr(layer, kind) for kind in layer.adapter_layer_names)
    )
    endings = tuple(f".{name}" for name in adapted)
    return None if any(name.endswith(endings) and name not in adapted for name in layers) else adapted


def check_bare(parts: Mapping[str, object]) -> None:
    """Raise `ModelError` if one of a pipeline's components has adapters already.

    With adapters off, the teacher would be the base without them, and roles of the same names would replace them.
    """
    for component, part in parts.items():
        names = adapters_of(part) if isinstance(part, nn.Module) else []
        if names:
            raise ModelError(
                f"the pipeline's {component} has adapters already: {', '.join(map(repr, names))}. If they are a LoRA "
                "that the base shall have, call pipe.fuse_lora() and pipe.unload_lora_weights() (PixArt's have "
                "neither: PEFT's merge_and_unload()), save that with pipe.save_pretrained(folder) and train on the "
                "folder; if they are another trainer's, load the pipeline afresh: one pipeline serves one trainer"
            )


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and two-dimensional convolution layers of a network by name, without those of adapters.

    A layer that has adapters already is found under the name that it had before. Quantized layers are linear ones too.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }


def last_names(network: nn.Module) -> list[str]:
    """Return the last parts of linear layers' names, each once, sorted: what a LoRA config may name."""
    named = linear_layers(network).items()
    return sorted({name.split(".")[-1] for name, layer in named if isinstance(layer, nn.Linear)})


def target_names(network: nn.Module, excluded: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the layers of `linear_layers` that can have adapters.

    Args:
        network: the backbone, with or without adapters.
        excluded: endings of names of layers to leave out.
    """
    endings = tuple(f".{ending}" for ending in excluded)
    return tuple(
        name
        for name, layer in linear_layers(network).items()
        # PEFT refuses a convolution whose groups do not divide the rank; depthwise ones have thousands.
        if getattr(layer, "groups", 1) == 1 and not f".{name}".endswith(endings)
    )


def with_targets(config: LoraConfig, targets: Sequence[str], network: nn.Module) -> LoraConfig:
    """Return a copy of a LoRA config that names the layers it is for.

    Args:
        config: as the user gave it. PEFT's "all-linear" may also be a list with that one entry, which is what command
            lines and YAML make of it.
        targets: names of the layers, or endings of names, for a config that names none.
        network: the backbone.

    Raises:
        ConfigError: if a name or pattern fits no layer.
    """
    copied = copy.deepcopy(config)
    named = copied.target_modules
    if named and not isinstance(named, str) and [name.lower() for name in named] == ["all-linear"]:
        copied.target_modules = "all-linear"
    else:
        _check_names(copied, network)
    if named:
        return copied
    copied.target_modules = list(targets)
    if copied.init_lora_weights == "orthogonal":  # which PEFT has for linear layers alone
        layers = linear_layers(network)
        copied.target_modules = [n for n in copied.target_modules if not isinstance(layers.get(n), nn.Conv2d)]
    if copied.layers_to_transform is not None:
        # PEFT takes what is named in full whatever its index, so the indices are looked at here.
        copied.target_modules = [
            name for name in copied.target_modules if check_target_module_exists(copied, f"backbone.{name}")
        ]
        copied.layers_to_transform = copied.layers_pattern = None
    return copied


def _check_names(config: LoraConfig, network: nn.Module) -> None:
    """Raise `ConfigError` for names and patterns that fit no layer: PEFT passes over them."""
    paths = [path for path, _ in network.named_modules()]
    endings = {path.split(".", depth)[-1] for path in paths for depth in range(path.count(".") + 1)}
    named = () if isinstance(config.target_modules, str) else config.target_modules or ()
    unknown = {name: "target_modules" for name in named if name not in endings}
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(re.fullmatch(pattern, ending) for ending in endings):
                unknown[pattern] = option
    for name, option in sorted(unknown.items()):
        close = " or ".join(map(repr, difflib.get_close_matches(name, sorted(endings))))
        raise ConfigError(
            f"{option} of the LoRA config has {name!r}, and no layer of this model has a name that ends so"
            + (f"; did you mean {close}?" if close else ".")
            + f" Linear layers of this model: {', '.join(last_names(network))}"
        )
