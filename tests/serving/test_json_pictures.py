"""The JSON form's pictures are read as `rdm-sdk score` reads them."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from rdm_sdk.serving.requests import JSON, Limits, RequestError, parse_request

LIMITS = Limits()


def odd_png(mode: str, **info: Any) -> str:
    """A PNG in base64, 8 high and 4 wide, white above black, with something that not all readers mind."""
    file, picture = BytesIO(), Image.new(mode, (4, 8))
    picture.paste(255 if mode in ("L", "P") else "white", (0, 0, 4, 4))
    picture.save(file, "PNG", **info)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("mode", "color"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_color_is_refused(mode: str, color: Any) -> None:
    """As `rdm-sdk score` does; one that the picture has not is no matter."""
    body = json.dumps({"images": [odd_png(mode, transparency=color)]}).encode()
    with pytest.raises(RequestError, match="image 0 is partly transparent"):
        parse_request(body, JSON, LIMITS)
    unused = 7 if mode != "RGB" else (7, 7, 7)
    assert len(parse_request(json.dumps({"images": [odd_png(mode, transparency=unused)]}).encode(), JSON, LIMITS)) == 1


def test_a_picture_is_turned_as_its_camera_said() -> None:
    """So that a server gives the scores that `rdm-sdk score` gives."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (turned,) = parse_request(json.dumps({"images": [odd_png("L", exif=exif)]}).encode(), JSON, LIMITS).images
    assert turned.shape == (3, 4, 8)
    assert turned[0].tolist() == [[0] * 4 + [255] * 4] * 4
