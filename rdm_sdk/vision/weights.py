"""Finding and reading the weights of reward models: hub id or path, safetensors or safe pickles, always checked."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_sdk.errors import RewardError, nearest
from rdm_sdk.files import looks_local
from rdm_sdk.rewards.base import RewardConfig


class PretrainedConfig(RewardConfig):
    """Options of every reward with a pretrained model."""

    path: str | None = None
    """A hub id or a local path to load from, instead of the reward's own hub id."""
    revision: str | None = None
    """Revision of the hub repository: a branch, a tag or a commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the model's weights; preprocessing and scores are float32 in any case."""

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def expanded(source: str) -> str:
    """Return a hub id as it is, and an existing path with its `~` resolved, for `from_pretrained`."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


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


def unavailable(source: str, error: Exception, what: str = "weights") -> RewardError:
    """Return the error for weights (or what else a model needs) that cannot be had."""
    problem = _reason(error) if isinstance(error, UnpicklingError) else f"{type(error).__name__}: {error}"
    return RewardError(
        f"the {what} {source!r} cannot be loaded: {problem}. Pass path= a hub id you have "
        "access to, or a local file or folder."
    )


def load_pretrained(
    loader: Any, source: str, what: str, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Return `loader.from_pretrained` of a hub id or local folder, frozen and in eval mode.

    `from_pretrained` fills up what a checkpoint lacks with random weights and only logs it; here that is an error.

    Args:
        loader: a model class of transformers, or one of its Auto classes.
        source: a hub id or a local folder.
        what: the model's name in errors.
        revision: of the hub repository.
        dtype: of the weights.

    Raises:
        RewardError: there is no such model in `transformers` format there.
    """
    try:
        model, report = loader.from_pretrained(
            expanded(source), revision=revision, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise unavailable(source, error) from error
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    if missing or mismatched:
        raise RewardError(
            f"the checkpoint at {source!r} does not fit {what}: missing {missing[:3]}, of another shape "
            f"{mismatched[:3]} ({len(missing)} and {len(mismatched)} in all); is it another model's?"
        )
    return model.requires_grad_(False).eval()


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a file of another kind is refused below, not remarked upon
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise RewardError(f"{str(path)!r} is no weights file: expected .safetensors, .pt, .pth or .bin")
    except RewardError:
        raise
    except Exception as error:  # a file of another kind can break the unpickler in any way
        raise RewardError(
            f"cannot read the weights {str(path)!r}: {_reason(error)}. Is it a complete download of the checkpoint "
            "that the reward asks for?"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise RewardError(f"{str(path)!r} does not hold a mapping of names to tensors; got {type(content).__name__}")
    return dict(content)


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # torch's own text advises to switch the protection off
        return "it is no checkpoint, or it holds objects other than tensors, which could run code"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('. ')}"


def load_checked(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors into a module after checking that names and shapes are exactly the module's.

    Raises:
        RewardError: names are missing or too many, or shapes differ; the first few of each are named.
    """
    expected = module.state_dict()
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        hint = nearest(missing[0], surplus) if missing else ""
        raise RewardError(
            f"the checkpoint of {what} does not fit: {_some('missing', missing)}{_some('not expected', surplus)}"
            f"is it another model's?{hint}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise RewardError(
                f"the checkpoint of {what} does not fit: {name!r} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)}; is it another model's?"
            )
    module.load_state_dict(dict(tensors))


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}: {', '.join(names[:3])}{more}; "
