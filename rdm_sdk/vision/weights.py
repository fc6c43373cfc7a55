"""Finding and reading the weights of reward models: hub id or path, safetensors or safe pickles, always checked."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_sdk.errors import RewardError, nearest
from rdm_sdk.rewards.base import RewardConfig


class PretrainedConfig(RewardConfig):
    """Options of every reward with a pretrained model."""

    path: str | None = None
    """A hub id or a local path to load from, instead of the reward's own hub id."""
    revision: str | None = None
    """Of the hub repository: a branch, a tag or a commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's weights; preprocessing and scores are float32 in any case."""

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def looks_local(source: str) -> bool:
    """Whether a source must be a path: it exists, or no hub id is written like it."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


def find_file(source: str, filename: str, revision: str | None = None) -> Path:
    """Return a file of a hub repository or a local folder; a source that is a file is taken as it is.

    Raises:
        RewardError: there is no such file, or the hub does not hand it out.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if looks_local(source):
        if not (path / filename).is_file():
            raise RewardError(f"there are no weights at {source!r}: neither the file itself nor {filename!r} inside it")
        return path / filename
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except Exception as error:
        raise unavailable(source, error) from error


def unavailable(source: str, error: Exception) -> RewardError:
    """Return the error for weights that cannot be had."""
    return RewardError(
        f"the weights {source!r} cannot be loaded: {type(error).__name__}: {error}. Pass path= a hub id you have "
        "access to, or a local file or folder."
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a `.pt`, `.pth` or `.bin` file (`weights_only`: no code is run).

    A mapping under the key `state_dict` is unwrapped.

    Raises:
        RewardError: the file is damaged, holds something other than tensors, or is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"there are no weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif zipfile.is_zipfile(path) or path.suffix in (".pt", ".pth", ".bin"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise RewardError(f"{str(path)!r} is no weights file: expected .safetensors, .pt, .pth or .bin")
    except (OSError, ValueError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise RewardError(
            f"cannot read the weights {str(path)!r}: {type(error).__name__}: {str(error).splitlines()[0]}. Is it a "
            "complete download of the checkpoint that the reward asks for?"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise RewardError(f"{str(path)!r} does not hold a mapping of names to tensors; got {type(content).__name__}")
    return dict(content)


def load_checked(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors into a module after checking that names and shapes are exactly the module's.

    Raises:
        RewardError: names are missing or too many, or shapes differ; the first few of each are named.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or surplus:
        hint = nearest(missing[0], surplus) if missing else ""
        raise RewardError(
            f"the checkpoint of {what} does not fit: {_some('missing', missing)}{_some('not expected', surplus)}"
            f"is it another model's?{hint}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise RewardError(
                f"the checkpoint of {what} does not fit: {name!r} has shape {list(tensor.shape)}, expected "
                f"{list(own[name].shape)}; is it another model's?"
            )
    module.load_state_dict(dict(tensors))


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}: {', '.join(names[:3])}{more}; "
