"""What a server is asked: images with prompts and columns, in one of two forms, checked before anything is scored."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rdm_sdk.errors import shown
from rdm_sdk.rewards.base import RESERVED_COLUMNS, extremes
from rdm_sdk.rewards.images import opaque
from rdm_sdk.serving.tensors import CONTENT_TYPE, VERSION, BodyError, pack_parts, parse_json, unpack

JSON = "application/json"
FORMS = (CONTENT_TYPE, JSON)
FIELDS = ("version", "images", "prompts", "columns", "group_size", "rewards", "gradient_dtype", "step")
"""What a request may say; a client is told, and sends an older server no more than that one knows."""


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status from 400 to 499, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a request may hold; checked before it is read, decoded or scored."""

    body: int = 256 * 2**20
    """Bytes; pictures in PNG must stay below it once they are decoded, too."""
    images: int = 512
    side: int = 4096
    """Pixels of an image's longer side."""


@dataclass(frozen=True)
class Request:
    """Images to score."""

    images: Tensor
    """RGB `[N, 3, H, W]`: floats in [0, 1], or uint8."""
    prompts: list[str] | None = None
    columns: Mapping[str, list[object]] | None = None
    group_size: int = 1
    rewards: tuple[str, ...] | None = None
    """The labels of those that are asked; None is all that are served."""
    gradient_dtype: str = "F32"
    """How gradients travel back: "F32", or "F16" with a factor per sample."""
    step: int | None = None
    """The optimizer step of the run that asks, from 0."""

    def __len__(self) -> int:
        return len(self.images)


def as_floats(images: Tensor) -> Tensor:
    """Return images of a request in float32, in [0, 1]."""
    return images.float() if images.is_floating_point() else images.float().div_(255)


def pack_request(images: Tensor, **message: Any) -> bytes:
    """Return the body of a request: images `[N, 3, H, W]` in uint8, float16 or float32, and the fields of `Request`."""
    return b"".join(request_parts(images, **message))


def request_parts(images: Tensor, **message: Any) -> list[memoryview]:
    """Return the parts of the body that `pack_request` returns, without a copy of the images."""
    return pack_parts({name: value for name, value in message.items() if value is not None}, {"images": images})


def form_of(content_type: str) -> str:
    """Return the form that a `Content-Type` names, in lower case and without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def parse_request(body: bytes | bytearray, content_type: str, limits: Limits) -> Request:
    """Return what a request asks.

    Raises:
        RequestError: the body is not what the protocol says, or more than the limits allow.
    """
    form = form_of(content_type)
    if form not in FORMS:
        raise RequestError(415, f"the content type {shown(form, 60)} is not understood; send {' or '.join(FORMS)}")
    if len(body) > limits.body:
        raise RequestError(413, f"the body has {len(body)} bytes; at most {limits.body} are taken")
    try:
        message, images = _with_arrays(body, limits) if form == CONTENT_TYPE else _with_pictures(body, limits)
    except BodyError as error:
        raise RequestError(400, str(error)) from error
    unknown = sorted(message.keys() - set(FIELDS))
    if unknown:
        raise RequestError(400, f"the field {shown(unknown[0], 60)} is unknown; there are {', '.join(FIELDS)}")
    return _checked(message, images)


def _checked(message: Mapping[str, Any], images: Tensor) -> Request:
    """Return a request whose fields go with its images."""
    count, group_size = len(images), message.get("group_size", 1)
    if type(group_size) is not int or group_size < 1 or count % group_size:
        raise RequestError(422, f"{count} images cannot be in groups of {shown(group_size, 40)}")
    prompts, columns, rewards = message.get("prompts"), message.get("columns"), message.get("rewards")
    if prompts is not None and not _texts(prompts, count):
        raise RequestError(422, f"prompts must be a list of {count} texts, one per image")
    if columns is not None and not (
        isinstance(columns, dict) and all(isinstance(v, list) and len(v) == count for v in columns.values())
    ):
        raise RequestError(422, f"columns must map names to lists of {count} values, one per image")
    for name in columns or ():
        if name in RESERVED_COLUMNS:
            raise RequestError(422, f"a column cannot be called {name!r}")
    if rewards is not None and not (rewards and _texts(rewards)):
        raise RequestError(422, "rewards must be a list of names, at least one")
    gradient_dtype = message.get("gradient_dtype", "F32")
    if gradient_dtype not in ("F32", "F16"):
        raise RequestError(422, f"gradient_dtype must be 'F32' or 'F16'; got {shown(gradient_dtype, 40)}")
    step = message.get("step")
    if step is not None and (type(step) is not int or step < 0):
        raise RequestError(422, f"step must be a whole number from 0 on; got {shown(step, 40)}")
    named = None if rewards is None else tuple(dict.fromkeys(rewards))
    return Request(images, prompts, columns, group_size, named, gradient_dtype, step)


def _texts(value: object, count: int | None = None) -> bool:
    if not (isinstance(value, list) and len(value) == (count or len(value))):
        return False
    # JSON can spell halves of characters, which no tokenizer takes.
    return all(isinstance(v, str) and not any("\ud800" <= letter <= "\udfff" for letter in v) for v in value)


def _with_arrays(body: bytes | bytearray, limits: Limits) -> tuple[dict[str, Any], Tensor]:
    """Return the message and the images of the main form."""
    message, tensors = unpack(body)
    if list(tensors) != ["images"]:
        raise BodyError(f"a request holds one array, 'images'; got {shown(list(tensors), 80)}")
    images = tensors["images"]
    _check_size(images.shape, limits)
    if images.dtype == torch.uint8:
        return message, images
    low, high = extremes(images)
    if not (low > -torch.inf and high < torch.inf):
        raise RequestError(422, "the images hold NaN or infinities")
    if low < 0 or high > 1:
        raise RequestError(422, f"the images must lie in [0, 1]; they span [{low:.4g}, {high:.4g}]")
    return message, images


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    if len(shape) != 4 or shape[1] != 3 or not all(shape):
        raise RequestError(422, f"the images must be RGB, of shape [N, 3, H, W], at least one; got {list(shape)}")
    if shape[0] > limits.images or max(shape[2:]) > limits.side:
        raise RequestError(
            413,
            f"{shape[0]} images of {shape[2]} x {shape[3]}; at most {limits.images} are taken at a time, of at most "
            f"{limits.side} pixels on a side",
        )


def _with_pictures(body: bytes | bytearray, limits: Limits) -> tuple[dict[str, Any], Tensor]:
    """Return the message and the images of the JSON form: PNG files in base64."""
    message = parse_json(body, "the body")
    if not isinstance(message, dict) or not _texts(message.get("images")):
        raise BodyError("the body must be a JSON object with images: a list of PNG files in base64")
    if message.get("version", VERSION) != VERSION:
        raise BodyError(f"version {shown(message['version'], 40)} of the protocol is not spoken here, but {VERSION}")
    texts = message.pop("images")
    if len(texts) > limits.images:
        raise RequestError(413, f"{len(texts)} images; at most {limits.images} are taken at a time")
    pictures: list[np.ndarray[Any, Any]] = []
    left = limits.body
    for position, text in enumerate(texts):
        pixels = _decoded(text, position, limits.side, left)
        left -= pixels.nbytes
        pictures.append(pixels)
    if len({pixels.shape for pixels in pictures}) != 1:
        raise RequestError(422, "the images must be of one size, at least one; send another request for each size")
    return message, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _decoded(text: str, position: int, side: int, left: int) -> np.ndarray[Any, Any]:
    """Return the pixels `[H, W, 3]` of a PNG as it is shown, turned as its camera said (EXIF).

    Its header says how much it unpacks to before anything is unpacked.
    """
    try:
        file = base64.b64decode(text, validate=True)
        with Image.open(BytesIO(file), formats=["PNG"]) as picture:
            width, height = picture.size
            if max(width, height) > side or 3 * width * height > left:
                raise RequestError(
                    413,
                    f"image {position} is {width} x {height}; at most {side} pixels on a side are taken, and "
                    f"{left} more bytes in this request, unpacked",
                )
            if picture.mode not in ("RGB", "L", "P", "1"):
                raise RequestError(
                    422, f"image {position} is of mode {picture.mode}; send 8-bit RGB or gray, without an alpha channel"
                )
            shown_as = opaque(ImageOps.exif_transpose(picture))
            if shown_as is None:
                raise RequestError(
                    422, f"image {position} is partly transparent (tRNS); paste it on a background, and send that"
                )
            return np.asarray(shown_as)
    except RequestError:
        raise
    except Exception as error:  # whatever a decoder makes of hostile bytes
        raise RequestError(422, f"image {position} is no complete PNG in base64: {shown(str(error), 120)}") from error
