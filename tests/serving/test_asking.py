"""How long a server asks to be left alone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from rdm_sdk.serving.asking import Failed, PatientConfig, ServerLostError, asked_to_wait, persist


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


def test_a_wait_beyond_what_is_left_is_not_begun() -> None:
    """It is told at once, not when the time is over."""

    async def attempt() -> Failed:
        return Failed("busy", wait=0.3)

    with pytest.raises(ServerLostError, match=r"busy; it asks to wait 0\.3 s, which max_wait=0\.5 s does not allow"):
        asyncio.run(persist(attempt, PatientConfig(max_wait=0.5), "the judge"))
