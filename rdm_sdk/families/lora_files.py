"""What LoRA files hold, so that every program that reads them gets the same student."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor


def fold_scale(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return LoRA weights with their scale in them, and the config that goes with them: alpha is the rank everywhere.

    A layer is `W + scale B A`, and its scale, alpha / r, is no part of the weights: programs that read these alone take
    1. With `scale B` in the place of B, so do all.

    Args:
        state: PEFT's names, such as "blocks.0.to_q.lora_B.weight", to tensors.
        config: a `LoraConfig` as a dict, which may name ranks and alphas of single layers.
    """
    alphas: dict[str, float] = dict(config.get("alpha_pattern") or {})
    folded = dict(state)
    for name, tensor in state.items():
        layer, found, _ = name.partition(".lora_B.")
        if found:
            rank = tensor.shape[1]
            alpha: float = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
            folded[name] = tensor * (alpha / (sqrt(rank) if config.get("use_rslora") else rank))
    ranks = dict(config.get("rank_pattern") or {})
    return folded, {**config, "lora_alpha": config["r"], "alpha_pattern": ranks, "use_rslora": False}


def kohya_names(state: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """Return a UNet's LoRA under the names of kohya's scripts, which ComfyUI and most interfaces read, with its alphas.

    "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" is "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight".

    Args:
        state: diffusers' names to tensors, their scale folded in.
        component: "unet".
    """
    renamed = {}
    for name, tensor in state.items():
        layer, _, side = name.removeprefix(f"{component}.").removesuffix(".weight").rpartition(".")
        key = f"lora_{component}_{layer.replace('.', '_')}"
        renamed[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
        if side == "lora_A":
            renamed[f"{key}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return renamed
