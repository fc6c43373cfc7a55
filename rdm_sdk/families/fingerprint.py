"""A hash by which a base is known again."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(backbone: nn.Module) -> str:
    """Return a hash of a base's shapes and of samples of its weights, whatever adapters are on it."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        if "lora_" not in name:
            sample = parameter.detach().flatten()[:16].float().cpu()
            digest.update(f"{name.replace('.base_layer', '')}{list(parameter.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
