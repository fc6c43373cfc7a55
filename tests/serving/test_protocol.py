"""What travels between client and server: exact where it should be, refused where it is anything else."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from rdm_sdk import Capabilities, RewardOutput
from rdm_sdk.serving.answers import described_capabilities, pack_answer, read_answer, read_capabilities
from rdm_sdk.serving.requests import Limits, RequestError, as_floats, pack_request, parse_request
from rdm_sdk.serving.tensors import CONTENT_TYPE, BodyError, pack, unpack

LIMITS = Limits(body=2**20, images=8, side=64)
JSON = "application/json"


def images(count: int = 2, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> str:
    """A PNG in base64."""
    file = BytesIO()
    Image.new(mode, (width, height), 128).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes that unpacks to width x height pixels of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(min(height * (1 + 3 * width), 10**6)))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)).decode()


def body_of(header: Any, data: bytes = b"") -> bytes:
    """A body with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**fields: Any) -> dict[str, Any]:
    """A header of one array of two gray images of a pixel, some of its fields replaced."""
    array = {"dtype": "F32", "shape": [2, 3, 1, 1], "data_offsets": [0, 24]}
    message = {"version": 1} | {name: fields.pop(name) for name in list(fields) if name not in array}
    return {"__metadata__": {"rdm": json.dumps(message)}, "images": array | fields}


HALF = struct.pack("<6f", *[0.5] * 6)


def test_what_is_packed_comes_back() -> None:
    """Bit for bit, in each dtype, with texts of any script."""
    for dtype in (torch.float32, torch.float16, torch.uint8):
        sent = (images() * 255).to(dtype) if dtype == torch.uint8 else images().to(dtype)
        fields: dict[str, Any] = {"prompts": ["a \u72d0", 'two "boats"'], "columns": {"k": [1, None]}, "rewards": ["x"]}
        body = pack_request(sent, group_size=2, gradient_dtype="F16", **fields)
        got = parse_request(body, CONTENT_TYPE, LIMITS)
        assert torch.equal(as_floats(got.images), sent.float() / 255 if dtype == torch.uint8 else sent.float())
        assert (got.prompts, got.columns, got.rewards) == (fields["prompts"], fields["columns"], ("x",))
        assert (got.group_size, got.gradient_dtype) == (2, "F16")


def test_a_body_is_what_the_library_for_such_files_reads() -> None:
    """Any dtype, in any order, and an array without entries."""
    sent = {"b": torch.arange(3, dtype=torch.uint8), "a": images().half(), "c": torch.zeros(0, 3), "d": torch.ones(5)}
    body = pack({"x": 1}, sent)
    got = safetensors.torch.load(body)
    assert got.keys() == sent.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in sent.items())
    length = int.from_bytes(body[:8], "little")
    assert json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["rdm"]) == {"version": 1, "x": 1}


def test_arrays_begin_where_arrays_may() -> None:
    """At a multiple of eight bytes, however long the message is."""
    bodies = [pack({"x": "." * count}, {}) for count in range(8)]
    assert {int.from_bytes(body[:8], "little") % 8 for body in bodies} == {0}


ONE_OF = {
    "every second": lambda values: values.reshape(-1, 2)[:1, 0],  # as `head(x)[:, 0]` of one image
    "the same again": lambda values: values[0].expand(1),  # as what `log("name", 0.5)` makes of a number
    "all but none": lambda values: values[0].expand(0),
    "one of several": lambda values: values.reshape(1, 1, 2, 2)[:, :, :1, 1],
}


@pytest.mark.parametrize("form", ONE_OF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_an_array_of_one_number_has_any_stride(form: str, dtype: torch.dtype) -> None:
    """It is contiguous whatever its stride, and travels."""
    sent = ONE_OF[form](torch.arange(3, 7).to(dtype))
    assert sent.is_contiguous()
    assert torch.equal(safetensors.torch.load(pack({}, {"x": sent}))["x"], sent)


def test_another_language_can_write_it() -> None:
    """Eight bytes, a header, an array: nothing else is needed."""
    got = parse_request(body_of(entry(), HALF), CONTENT_TYPE, LIMITS)
    assert torch.equal(got.images, torch.full((2, 3, 1, 1), 0.5))


def test_pictures_in_json() -> None:
    """PNG files in base64; gray ones and palettes become RGB."""
    for mode in ("RGB", "L", "P"):
        body = json.dumps({"images": [png(mode=mode)] * 2, "prompts": ["a", "b"]}).encode()
        got = parse_request(body, f"{JSON}; charset=utf-8", LIMITS)
        assert got.images.shape == (2, 3, 8, 8)
        assert got.images.dtype == torch.uint8


BAD_ARRAYS = [
    (b"", 400, "cannot hold a header"),
    (b"\xff" * 8, 400, "cannot hold a header"),
    (b"\x10" + bytes(7) + b"{}", 400, "cannot hold a header of 16 bytes"),
    (body_of(b"{}"), 400, "needs a __metadata__"),
    (body_of(b"[]"), 400, "must be a JSON object"),
    (body_of(b"\xff\xfe"), 400, "is no JSON"),
    (body_of(b"[" * 100_000), 400, "is no JSON"),
    (body_of(entry(), HALF[:-1]), 400, "23 bytes have come"),
    (body_of(entry(), HALF + b"x"), 400, "end at byte 24, and 25 bytes"),
    (body_of(entry(data_offsets=[0, 20]), HALF), 400, "takes 24 bytes"),
    (body_of(entry(data_offsets=[4, 28]), HALF + b"1234"), 400, "takes 24 bytes from 0 on"),
    (body_of(entry(data_offsets=[-24, 0]), HALF), 400, "from 0 on"),
    (body_of(entry(data_offsets=[0, 2**70]), HALF), 400, "takes 24 bytes"),
    (body_of(entry(data_offsets="0-24"), HALF), 400, "needs data_offsets"),
    (body_of(entry(shape=[2, 3, 2**30, 2**30]), HALF), 400, "takes"),
    (body_of(entry(shape=[2, 3, 2**31, 1]), HALF), 400, "each from 1 to 2147483647"),
    (body_of(entry(shape=[0, 2**62, 2**62, 3], data_offsets=[0, 0])), 400, "no shape"),
    (body_of(entry(shape=[0, 2**70, 1, 1], data_offsets=[0, 0])), 400, "no shape"),
    (body_of(entry(shape=[-2, 3, 1, -1]), HALF), 400, "no shape"),
    (body_of(entry(shape=[True, 3, 1, 2]), HALF), 400, "no shape"),
    (body_of(entry(dtype="F64"), HALF), 400, "of dtype 'F64'; send one of U8, F16, F32"),
    (body_of(entry(dtype=["F32"]), HALF), 400, "of dtype"),
    (body_of(entry(version=2), HALF), 400, "version 2 of the protocol"),
    (
        body_of(entry() | {"more": {"dtype": "U8", "shape": [1], "data_offsets": [24, 25]}}, HALF + b"1"),
        400,
        "one array",
    ),
    (body_of(entry(path="/etc/passwd"), HALF), 400, "'path' is unknown"),
    (body_of({"__metadata__": {"rdm": "NaN"}}), 400, "holds NaN"),
    (body_of({"__metadata__": {"rdm": "[" * 10_000}}), 400, "is no JSON"),
    (body_of({"__metadata__": {"rdm": 3}}), 400, "needs a __metadata__"),
    (body_of(entry(shape=[6]), HALF), 422, r"of shape [N, 3, H, W], at least one; got [6]"),
    (body_of(entry(shape=[2, 1, 1, 3]), HALF), 422, "must be RGB"),
    (body_of(entry(shape=[0, 3, 1, 1], data_offsets=[0, 0])), 400, "each from 1 to"),
    (body_of(entry(shape=[], data_offsets=[0, 4]), HALF[:4]), 422, "at least one; got []"),
    (pack_request(images(9)), 413, "9 images of 8 x 8; at most 8"),
    (pack_request(images(1, 65)), 413, "at most 64 pixels"),
    (pack_request(torch.full((1, 3, 2, 2), torch.nan)), 422, "NaN or infinities"),
    (pack_request(torch.full((1, 3, 2, 2), torch.inf)), 422, "NaN or infinities"),
    (pack_request(images() * 2), 422, "must lie in [0, 1]"),
    (pack_request(images() - 0.1), 422, "must lie in [0, 1]"),
    (pack_request(images(), prompts=["a"]), 422, "a list of 2 texts"),
    (pack_request(images(), prompts=["a", 3]), 422, "a list of 2 texts"),
    (pack_request(images(), prompts=["a", "\ud800"]), 422, "a list of 2 texts"),
    (pack_request(images(), prompts="ab"), 422, "a list of 2 texts"),
    (pack_request(images(), columns={"k": [1]}), 422, "lists of 2 values"),
    (pack_request(images(), columns=[1]), 422, "lists of 2 values"),
    (pack_request(images(), columns={"images": [1, 2]}), 422, "a column cannot be called 'images'"),
    (pack_request(images(), group_size=3), 422, "in groups of 3"),
    (pack_request(images(), group_size=0), 422, "in groups of 0"),
    (pack_request(images(), group_size=True), 422, "in groups of True"),
    (pack_request(images(), rewards=[]), 422, "at least one"),
    (pack_request(images(), rewards="clip"), 422, "a list of names"),
    (pack_request(images(), gradient_dtype="F64"), 422, "must be 'F32' or 'F16'"),
    (pack_request(images(), step=-1), 422, "a whole number from 0 on"),
    (pack_request(images(), step=True), 422, "a whole number from 0 on"),
    (b"x" * (2**20 + 1), 413, "at most 1048576"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays(body: bytes, status: int, words: str) -> None:
    """Each is refused with what is wrong with it."""
    with pytest.raises(RequestError) as caught:
        parse_request(body, CONTENT_TYPE, LIMITS)
    assert caught.value.status == status
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


CUT = base64.b64encode(base64.b64decode(png(32, 32))[:60]).decode()
BAD_PICTURES = [
    (b"", 400, "is no JSON"),
    (b"{", 400, "is no JSON"),
    (b"[" * 100_000, 400, "is no JSON"),
    (b"[]", 400, "must be a JSON object"),
    (b'{"images": 3}', 400, "must be a JSON object with images"),
    (b'{"images": [], "group_size": NaN}', 400, "holds NaN"),
    ({"images": []}, 422, "at least one"),
    ({"images": ["../../etc/passwd"]}, 422, "image 0 is no complete PNG"),
    ({"images": [png()[:-40]]}, 422, "image 0 is no complete PNG"),
    ({"images": [png(), CUT]}, 422, "image 1 is no complete PNG"),
    ({"images": [base64.b64encode(b"GIF89a" + bytes(100)).decode()]}, 422, "is no complete PNG"),
    ({"images": [png(65, 8)]}, 413, "image 0 is 65 x 8"),
    ({"images": [bomb(12_000, 12_000)]}, 413, "12000 x 12000"),
    ({"images": [bomb(30_000, 30_000)]}, 422, "could be decompression bomb"),
    ({"images": [bomb(2**31 - 1, 2**31 - 1)]}, 422, "image 0"),
    ({"images": [png(), png(9, 8)]}, 422, "of one size"),
    ({"images": [png()] * 9}, 413, "9 images; at most 8"),
    ({"images": [png(mode="RGBA")]}, 422, "without an alpha channel"),
    ({"images": [png()], "version": 7}, 400, "version 7"),
    ({"images": [png()], "pickle": "gASV"}, 400, "'pickle' is unknown"),
    ({"images": [png()], "prompts": [1]}, 422, "a list of 1 texts"),
]


@pytest.mark.parametrize(("message", "status", "words"), BAD_PICTURES, ids=range(len(BAD_PICTURES)))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures(message: Any, status: int, words: str) -> None:
    """Each is refused with what is wrong with it, before it is unpacked."""
    with pytest.raises(RequestError) as caught:
        parse_request(message if isinstance(message, bytes) else json.dumps(message).encode(), JSON, LIMITS)
    assert words in str(caught.value)
    assert caught.value.status == status


def test_pictures_may_not_unpack_to_more_than_a_body_may_hold() -> None:
    """Many small files that unpack to a lot are a bomb, too."""
    body = json.dumps({"images": [png(64, 64)] * 8}).encode()
    assert len(parse_request(body, JSON, LIMITS)) == 8
    with pytest.raises(RequestError, match=r"image 5 is 64 x 64.* 3572 more bytes"):
        parse_request(body, JSON, Limits(body=65_012, images=8, side=64))


@pytest.mark.parametrize("form", ["", "text/html", "application/octet-stream", "application/x-pickle"])
def test_other_forms_are_refused(form: str) -> None:
    """Nothing is guessed from the body."""
    with pytest.raises(RequestError, match="is not understood; send") as caught:
        parse_request(pack_request(images()), form, LIMITS)
    assert caught.value.status == 415


def hostile_bodies(count: int) -> list[tuple[bytes, str]]:
    """Bodies that were right once: bytes flipped, cut, repeated, and JSON whose values were exchanged."""
    draw = random.Random(0)
    right = pack_request(images().half(), prompts=["a", "b"], columns={"k": [1, 2]}, group_size=2)
    pictures = {"version": 1, "images": [png()] * 2, "prompts": ["a", "b"], "columns": {"k": [1, 2]}, "group_size": 2}
    odd = [None, True, -1, 2**70, 1e308, "", "\ud800", "../x", [], [[]], {}, {"a": {}}, [None] * 3, "A" * 999, [png()]]
    bodies = []
    for index in range(count):
        if index % 3 == 0:
            message = pictures | {draw.choice(list(pictures)): draw.choice(odd) for _ in range(draw.randint(1, 3))}
            bodies.append((json.dumps(message).encode(), JSON))
            continue
        body = bytearray(right if index % 3 == 1 else json.dumps(pictures).encode())
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(max(len(body), 1))
            kind = draw.randrange(4)
            if kind == 0 and body:
                body[place % len(body)] = draw.randrange(256)
            elif kind == 1:
                del body[place:]
            elif kind == 2:
                body[place:place] = draw.randbytes(draw.randint(1, 40))
            else:
                del body[place : place + draw.randint(1, 20)]
        bodies.append((bytes(body), CONTENT_TYPE if index % 3 == 1 else JSON))
    return bodies


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_five_thousand_hostile_bodies() -> None:
    """Each is taken for what it is, or refused with a status from 400 to 499 and a sentence; nothing else is raised."""
    refusals = []
    for body, form in hostile_bodies(5000):
        try:
            got = parse_request(body, form, LIMITS)
        except RequestError as error:
            refusals.append((error.status, len(str(error))))
        else:
            shown = as_floats(got.images)
            assert 0 <= shown.min() <= shown.max() <= 1
    assert all(400 <= status < 500 and 0 < length < 1000 for status, length in refusals)
    assert 4000 < len(refusals) < 5000


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_answers_come_back() -> None:
    """Float32 exactly; float16 to its rounding, relative to each sample's largest entry, however small it is."""
    scores = torch.tensor([0.5, torch.nan])
    gradient = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-9, 1e3]).reshape(
        2, 1, 1, 1
    )
    gradient[0, 0, 0, 0] = 0
    shape = list(gradient.shape)
    exact = read_answer(pack_answer({"a b[c]": RewardOutput(scores, gradient)}), "a b[c]", shape, True)
    torch.testing.assert_close(exact.scores, scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(exact.gradient, gradient)  # type: ignore[arg-type]
    short = read_answer(pack_answer({"x": RewardOutput(scores, gradient)}, "F16"), "x", shape, True).gradient
    largest = gradient.flatten(1).abs().amax(1).reshape(2, 1, 1, 1)
    assert short is not None
    assert ((short - gradient).abs() / largest).max() <= 2**-11
    flat = pack_answer({"x": RewardOutput(scores, torch.zeros(2, 3, 4, 4))}, "F16")
    assert torch.equal(read_answer(flat, "x", shape, True).gradient, torch.zeros(2, 3, 4, 4))  # type: ignore[arg-type]
    for applies in (None, torch.tensor([True, False])):
        told = pack_answer({"x": RewardOutput(scores, gradient, applies=applies)})
        got = [read_answer(told, "x", shape, graded).applies for graded in (True, False)]
        assert [None if one is None else one.tolist() for one in got] == [
            None if applies is None else [True, False]
        ] * 2


ONES = torch.ones(2, 3, 4, 4)
BAD_ANSWERS = [
    ({}, "scores/x' must be floats of shape [2]; got none"),
    ({"scores/x": torch.ones(3), "gradient/x": ONES}, "got [3] torch.float32"),
    ({"scores/x": torch.ones(2, dtype=torch.uint8), "gradient/x": ONES}, "got [2] torch.uint8"),
    ({"scores/x": torch.tensor([1.0, torch.inf]), "gradient/x": ONES}, "holds an infinite number"),
    ({"scores/x": torch.ones(2)}, "gradient/x' must be floats"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES[:1]}, "of shape [2, 3, 4, 4]; got [1, 3, 4, 4]"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES * torch.nan}, "is not finite"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "scale/x": torch.tensor([1.0, torch.nan])}, "is not finite"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "scale/x": torch.ones(3)}, "got [3]"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "logged/x/y": torch.ones(3)}, "logged/x/y' must be floats"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "applies/x": torch.ones(2)}, "applies/x' must be 1 or 0"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "applies/x": ONES[0, 0, 0].byte()}, "got [4] torch.uint8"),
    ({"scores/x": torch.ones(2), "gradient/x": ONES, "applies/x": 2 * ONES[:, 0, 0, 0].byte()}, "must be 1 or 0"),
]


@pytest.mark.parametrize(("tensors", "words"), BAD_ANSWERS, ids=range(len(BAD_ANSWERS)))
def test_bad_answers(tensors: dict[str, Tensor], words: str) -> None:
    """None of them becomes a score."""
    with pytest.raises(BodyError) as caught:
        read_answer(pack({}, tensors), "x", [2, 3, 4, 4], True)
    assert words in str(caught.value)


def test_capabilities_come_back() -> None:
    """All that a client must know; a reward without a gradient gets none."""
    for gradient, bounds in (("autograd", (0.0, 1.0)), ("none", (-torch.inf, 0.0)), ("awaited", None)):
        declared = Capabilities(
            gradient=gradient,  # type: ignore[arg-type]
            asynchronous=gradient == "awaited",
            scope="group",
            prompts=True,
            columns=("a",),
            range=bounds,
            stochastic=True,
        )
        got = read_capabilities(json.loads(json.dumps(described_capabilities(declared))), ["b"])
        assert got.reads == ("b",)
        assert got.asynchronous
        assert got.gradient == ("none" if gradient == "none" else "awaited")
        for name in ("scope", "prompts", "columns", "range", "stochastic"):
            assert getattr(got, name) == getattr(declared, name)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"gradient": "field"}, {"scope": 3}, {"prompts": 1}, {"columns": "abc"}, {"columns": [1]}, {"more": 1}),
        *({"range": [1]}, {"range": [2, 1]}, {"range": ["0", "1"]}),
    ],
)
def test_bad_capabilities(wrong: dict[str, Any]) -> None:
    """A server that says something else is no server of rewards."""
    with pytest.raises(BodyError):
        read_capabilities(described_capabilities(Capabilities()) | wrong, [])


@pytest.mark.parametrize("reads", [None, "abc", [1]])
def test_bad_names_of_columns(reads: Any) -> None:
    """What a reward reads is a list of texts."""
    with pytest.raises(BodyError, match="must be a list of names"):
        read_capabilities(described_capabilities(Capabilities()), reads)


def test_unpack_is_strict_about_answers_too() -> None:
    """A cut answer is none."""
    body = pack_answer({"x": RewardOutput(torch.ones(2))})
    assert list(unpack(body)[1]) == ["scores/x"]
    with pytest.raises(BodyError):
        unpack(body[:-1])
