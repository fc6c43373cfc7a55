"""Encodings of prompts on disk (`prompt_cache`): read by every later start, and by all processes of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from rdm_sdk.errors import DataError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.fingerprint import fingerprint
from rdm_sdk.types import Condition, bytes_in

logger = logging.getLogger(__name__)


class PromptStore:
    """A folder of files, one per batch of prompts, each under a hash of its prompts and of what encodes them.

    Files are mapped into memory, so that what is read takes no memory that the system could not have back. Several
    runs, bases and processes may share a folder, because `encoder` is a hash of what encodes (`encoder_key`).
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self.folder = Path(folder).expanduser() / encoder
        self._sound: dict[Path, bool] = {}
        """Files that were looked at, and whether they can be read."""

    def path(self, batch: Sequence[str]) -> Path:
        """Return where a batch is kept."""
        return self.folder / f"{hashlib.sha256(json.dumps(list(batch)).encode()).hexdigest()[:32]}.safetensors"

    def holds(self, batch: Sequence[str]) -> bool:
        """Return whether there is a batch of prompts that can be read; a damaged one is named in a warning."""
        path = self.path(batch)
        if not self._sound.get(path, False):
            self._sound[path] = path.is_file() and self._is_sound(path, batch)
        return self._sound[path]

    def _is_sound(self, path: Path, batch: Sequence[str]) -> bool:
        """Return whether a file is whole by its header; its values are checked when they are read."""
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            logger.warning(f"prompt_cache: {path} is damaged ({error}); its {len(batch)} prompts are encoded again")
            return False
        return bool(json.loads(facts.get("prompts", "null")) == list(batch))

    def row(self, batch: Sequence[str], place: int) -> tuple[Condition, dict[str, int]]:
        """Return the encoding of one prompt of a batch without its padding, and the lengths that tensors have with it.

        Raises:
            DataError: the file was changed since it was written.
        """
        path, prefix = self.path(batch), f"{place}."
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
                row = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if _checksum(row) != json.loads(facts["checksums"])[place]:
            raise _damaged(path, "its checksum is another")
        return row, json.loads(facts["lengths"])

    def write(self, batch: Sequence[str], rows: Sequence[Condition], lengths: dict[str, int]) -> None:
        """Keep the encodings of a batch, whole or not at all.

        Raises:
            DataError: they cannot be written, as on a full disk.
        """
        facts = {
            "prompts": json.dumps(list(batch)),
            "lengths": json.dumps(lengths),
            "checksums": json.dumps([_checksum(row) for row in rows]),
        }
        tensors = {f"{place}.{name}": tensor for place, row in enumerate(rows) for name, tensor in row.items()}
        path = self.path(batch)
        staged = path.with_name(f"{uuid.uuid4().hex}.tmp")  # another run may be writing the same batch
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, staged, facts)
            staged.replace(path)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"prompt_cache: the encodings of {len(batch)} prompts could not be written to {str(self.folder)!r} "
                f"({error}). Make room there and start again, which goes on with the prompts that are missing; or name "
                "another folder"
            ) from error
        finally:
            with suppress(OSError):  # the error that is told is the one that came first
                staged.unlink(missing_ok=True)
        self._sound[path] = True


def encoder_key(family: ModelFamily, guidance_scale: float) -> str:
    """Return a hash of all that decides a prompt's encoding but the prompt and the prompts beside it.

    Of the encoders' weights there are samples of every tensor (`fingerprint`); of the tokenizers, all. Versions of
    PyTorch and of the libraries whose code encodes are in it, as is the kind of device: what is read is what would be
    computed, up to kernels that differ between devices of a kind.
    """
    parts: dict[str, Any] = {
        "family": f"{type(family).__module__}.{type(family).__qualname__}",
        "max_sequence_length": family.max_sequence_length,
        "guidance_scale": guidance_scale if family.guidance == "embedded" else None,
        "device": family.device.type,
        "versions": [torch.__version__, transformers.__version__, diffusers.__version__],
    }
    for name, encoder in sorted(family.text_encoders().items()):
        dtypes = sorted({str(parameter.dtype) for parameter in encoder.parameters()})
        parts[name] = [type(encoder).__name__, fingerprint(encoder), dtypes]
    tokenizers = {n: c for n, c in family.pipeline.components.items() if isinstance(c, PreTrainedTokenizerBase)}
    parts |= {name: _tokenizer_facts(tokenizer) for name, tokenizer in tokenizers.items()}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _tokenizer_facts(tokenizer: Any) -> list[Any]:
    """Return what a tokenizer does, but for where it was loaded from and what its last call has set."""
    facts = [tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.model_max_length, tokenizer.chat_template]
    if not tokenizer.is_fast:
        return [*facts, sorted(tokenizer.get_vocab().items())]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [*facts, {name: value for name, value in state.items() if name not in ("truncation", "padding")}]


def _checksum(row: Condition) -> int:
    """Return a checksum of a row's names, dtypes, shapes and bytes."""
    total = 0
    for name, tensor in sorted(row.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(bytes_in(tensor), total)
    return total


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"prompt_cache: {path} is damaged ({why}); delete it and start again, and it is written anew")
