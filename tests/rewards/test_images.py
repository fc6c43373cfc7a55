"""Pictures in every form that people have them, and those that could be meant in two ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdm_sdk import DataError, RewardError, score_images
from rdm_sdk.rewards.images import read_images


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def pictures() -> Tensor:
    """Two gray pictures of 8 bits, float `[2, 3, 4, 6]`."""
    images = (torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return images.expand(-1, 3, -1, -1)


def forms() -> dict[str, list[Any]]:
    """The same two pictures, in many forms."""
    images = pictures()
    eight_bit = [(image.permute(1, 2, 0) * 255).round().byte() for image in images]
    sixteen = [Image.fromarray((image[0].double() * 65535).round().numpy().astype(np.uint16)) for image in images]
    return {
        "PIL": [to_pil(image) for image in images],
        "gray PIL": [to_pil(image).convert("L") for image in images],
        "opaque RGBA": [to_pil(image).convert("RGBA") for image in images],
        "palette": [to_pil(image).convert("L").convert("P") for image in images],
        "16-bit gray PIL": sixteen,
        "8-bit arrays": [array.numpy() for array in eight_bit],
        "8-bit tensors": eight_bit,
        "8-bit tensors, channels first": [array.permute(2, 0, 1) for array in eight_bit],
        "float tensors": list(images),
        "float arrays": [image.numpy().astype(np.float64) for image in images],
        "lists": [image.tolist() for image in images],
        "mixed": [to_pil(images[0]), images[1].tolist()],
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_of_a_picture_gives_the_same_images(form: str) -> None:
    """PIL of any mode that says its range, 8-bit arrays, float tensors and nested lists of floats."""
    got = read_images(forms()[form], "column 'image'", DataError)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, pictures().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (["a.png"], r"photo, row 0: a picture is a PIL image.*got str"),
        ([torch.zeros(3, 4, 4), torch.zeros(4, 4, 3)], "row 1: .*shape .4, 4, 3. and type torch.float32"),
        ([torch.zeros(3, 4, 3, dtype=torch.uint8)], "row 0: .*torch.uint8"),  # which of the two is the channel?
        ([torch.zeros(4, 4)], "row 0: "),
        ([torch.zeros(3, 4, 4, dtype=torch.bool)], "row 0: .*torch.bool"),
        ([None], "row 0: "),
        ([], "photo holds no picture"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], "differ in size; resize"),
        ([torch.full((3, 4, 4), 255.0)], r"row 0: values must lie in \[0, 1\].*\[255, 255\]"),
        ([torch.zeros(3, 4, 4), torch.full((3, 4, 4), -1.0)], r"row 1: values must lie in \[0, 1\].*x / 2 \+ 0.5"),
        ([torch.full((3, 4, 4), torch.nan)], r"values must lie in \[0, 1\]"),
        ([np.full((4, 4, 3), 40000, np.uint16)], r"values must lie in \[0, 1\]"),
        ([Image.fromarray(np.zeros((4, 4), np.int32))], "mode 'I' does not say what its white is; convert"),
        ([Image.fromarray(np.zeros((4, 4), np.float32))], "mode 'F' does not say"),
        ([Image.new("RGBA", (4, 4), (0, 0, 0, 9))], "partly transparent.*paste it on a background"),
    ],
)
def test_what_is_no_picture_is_named(column: list[Any], words: str) -> None:
    """The message names the column and the row, and what a picture may be."""
    with pytest.raises(DataError, match=words):
        read_images(column, "photo", DataError)


def brightness(images: Tensor, **_: Any) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("form", ["PIL", "8-bit arrays", "float tensors"])
def test_score_images_takes_pictures_as_people_have_them(form: str) -> None:
    """The scores are those of the float tensor."""
    expected = score_images(brightness, pictures()).outputs["brightness"].scores
    got = score_images(brightness, forms()[form]).outputs["brightness"].scores
    torch.testing.assert_close(got, expected)


def test_score_images_takes_8_bit_batches() -> None:
    """A tensor of 8-bit images, as a video reader or torchvision gives them."""
    got = score_images(brightness, (pictures() * 255).round().byte()).outputs["brightness"].scores
    torch.testing.assert_close(got, pictures().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (Image.new("RGB", (4, 4)), None, "images must be a tensor .* or a list; got Image"),
        ("a.png", None, "images must be a tensor .* or a list; got str"),
        (torch.rand(4, 3, 8, 8), "cats", r"prompts must be a list of texts; got the single text 'cats'"),
        (torch.rand(2, 3, 8, 8), ["a", None], "prompts, row 1: must be a text; got None"),
        (torch.rand(2, 3, 8, 8), [], "prompts must be a list of one or more texts"),
        ([], None, "images holds no picture"),
    ],
)
def test_score_images_refuses_one_where_many_are_meant(images: Any, prompts: Any, words: str) -> None:
    """A text's letters are no prompts, a picture's rows no pictures."""
    with pytest.raises(RewardError, match=words):
        score_images(brightness, images, prompts)


@pytest.mark.parametrize(("name", "values"), [("images", [1, 2]), ("prompts", ["a", "b"]), ("digit", "12")])
def test_columns_cannot_stand_for_the_images(name: str, values: Any) -> None:
    """A function would be given the column in place of what it is to judge; a text is no column either."""
    with pytest.raises(RewardError, match=f"column '{name}' cannot be used"):
        score_images(brightness, torch.rand(2, 3, 8, 8), columns={name: values})
