"""How long a server asks to be left alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from rdm_sdk.serving.asking import asked_to_wait


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3), ("0", 0), (" 120 ", 120), ("-3", 0), ("soon", 0), ("", 0), ("1e9", 0), ("9" * 50, 999_999_999)],
)
def test_seconds(text: str, seconds: float) -> None:
    """Whole seconds; what cannot be read asks for nothing."""
    assert asked_to_wait({"retry-after": text}) == seconds
    assert asked_to_wait({}) == 0


def test_dates() -> None:
    """A date in the future is as far as it is off, one that is over asks for nothing."""
    now = datetime.now(UTC)
    for offset, least, most in ((90, 85, 90), (-90, 0, 0)):
        date = format_datetime(now + timedelta(seconds=offset), usegmt=True)
        assert least <= asked_to_wait({"retry-after": date}) <= most
