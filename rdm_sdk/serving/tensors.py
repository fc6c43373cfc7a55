"""Bodies of requests and answers: a JSON header and raw arrays, as the safetensors format lays them out.

Eight bytes that say how long the header is (little-endian), the header, the arrays. Nothing in a body is ever run,
unpacked or looked up on a disk, and nothing is allocated because a header says so: arrays are as
long as what has come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rdm_sdk.errors import shown
from rdm_sdk.types import bytes_in

VERSION = 1
"""The version of the protocol; it changes when an older client or server could not go on."""
CONTENT_TYPE = "application/x-safetensors"
HEADER_LIMIT = 16 * 2**20
"""Bytes that a header may have: prompts and columns are in it."""
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_LIMIT = 2**31
"""No side of an array is that long; none is 0, because beside one the others could be of any length without a byte."""
KEY = "rdm"
"""The entry of the metadata that holds the rest of the message, as JSON."""


class BodyError(ValueError):
    """A body that is not what the protocol says."""


def pack(message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return a body: a message that is JSON, and named tensors of a dtype of `DTYPES`."""
    return b"".join(pack_parts(message, tensors))


def pack_parts(message: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return the parts of the body that `pack` returns: the header, and the tensors' memory without a copy.

    The library that reads and writes such files copies every array twice, which takes as long as sending it.
    """
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps({"version": VERSION} | dict(message), allow_nan=False)}}
    arrays, end = [], 0
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        begin, end = end, end + kept.nbytes
        header[name] = {"dtype": _NAMES[kept.dtype], "shape": list(kept.shape), "data_offsets": [begin, end]}
        arrays.append(memoryview(bytes_in(kept)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays begin where arrays may
    return [memoryview(len(text).to_bytes(8, "little") + text), *arrays]


def unpack(body: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `pack` was given: the message and the tensors, by name.

    Raises:
        BodyError: the body is something else, cut off, or of another version of the protocol.
    """
    header, start = _header(body)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    message = parse_json(text, f"the entry {KEY!r} of the metadata") if isinstance(text, str) else None
    if not isinstance(message, dict):
        raise BodyError(f"the header needs a __metadata__ with an entry {KEY!r}: a JSON object, as a text")
    if message.get("version") != VERSION:
        raise BodyError(
            f"version {shown(message.get('version'), 40)} of the protocol is not spoken here; this is version {VERSION}"
        )
    view = memoryview(body if isinstance(body, bytearray) else bytearray(body))[
        start:
    ]  # torch warns of a read-only one
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offset(*item)):
        tensors[name], end = _tensor(name, entry, view, end)
    if end != len(view):
        raise BodyError(f"the arrays end at byte {end}, and {len(view)} bytes have come")
    return message, tensors


def parse_json(text: str | bytes | bytearray, what: str) -> Any:
    """Return what a JSON text says.

    Raises:
        BodyError: it is not JSON, or nested too deeply; NaN and Infinity, which are no JSON, are refused as well.
    """

    def refuse(constant: str) -> None:
        raise BodyError(f"{what} holds {constant}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BodyError):
            raise
        raise BodyError(f"{what} is no JSON: {shown(str(error), 120)}") from error


def _header(body: bytes | bytearray) -> tuple[dict[str, Any], int]:
    """Return the header of a body, and where its arrays start."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > HEADER_LIMIT or 8 + length > len(body):
        raise BodyError(
            f"a body of {len(body)} bytes cannot hold a header of {length} bytes (at most {HEADER_LIMIT}); it must be "
            "in the safetensors format, and complete"
        )
    header = parse_json(body[8 : 8 + length], "the header")
    if not isinstance(header, dict):
        raise BodyError(f"the header must be a JSON object; got {shown(header, 80)}")
    return header, 8 + length


def _offset(name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)):
        raise BodyError(f"the array {shown(name, 60)} needs data_offsets: [begin, end]")
    begin: int = offsets[0]
    return begin


def _is_side(side: object) -> bool:
    return type(side) is int and 0 < side < SIDE_LIMIT


def _tensor(name: str, entry: dict[str, Any], view: memoryview, start: int) -> tuple[Tensor, int]:
    """Return the array that an entry of the header describes, starting where the last one ended, and its end."""
    dtype, shape, (begin, end) = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BodyError(f"the array {shown(name, 60)} is of dtype {shown(dtype, 40)}; send one of {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= 8 and all(map(_is_side, shape))):
        raise BodyError(
            f"the array {shown(name, 60)} has no shape that is taken: {shown(shape, 80)}; send at most 8 sides, each "
            f"from 1 to {SIDE_LIMIT - 1}"
        )
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if begin != start or end - begin != size or end > len(view):
        raise BodyError(
            f"the array {shown(name, 60)} of shape {shape} and dtype {dtype} takes {size} bytes from {start} on; its "
            f"offsets are [{begin}, {end}], and {len(view)} bytes have come"
        )
    # The arrays begin wherever the header ends, so that the numbers of a bad one are at odd addresses.
    part: Any = (
        view[begin:end] if torch.frombuffer(view, dtype=torch.uint8).data_ptr() % 8 == 0 else bytearray(view[begin:end])
    )
    return torch.frombuffer(part, dtype=DTYPES[dtype]).reshape(shape), end
