"""The embedded teacher with one transformer block instead of three: for tests of what surrounds the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from rdm_sdk import digits

LAST = "transformer_blocks.2."


def save_small_teacher(folder: Path) -> Path:
    """Write the teacher without its first two blocks into a folder, and return it.

    It makes no digits; whoever looks at pictures takes `digits.teacher_path()`.
    """
    shutil.copytree(digits.teacher_path(), folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("transformer_blocks")}
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith(LAST)}
    assert blocks
    save_file(kept | {name.replace(LAST, "transformer_blocks.0."): t for name, t in blocks.items()}, weights)
    return folder
