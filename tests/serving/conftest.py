"""Rewards behind a server of this process, which fails when it is told to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_servers import Faulty, Reader, Spread, serving

from rdm_sdk.digits.reward import Legibility
from rdm_sdk.serving import asking


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    """A server of legibility, a group reward and one that reads prompts and a column; it fails when told to."""
    with serving([Legibility(), Spread(), Reader()], token="hush") as app:
        yield app


@pytest.fixture
def sound(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test starts with a server that works, and with its token."""
    monkeypatch.setenv("JUDGE_TOKEN", "hush")
    monkeypatch.setattr(asking, "BACKOFF", 0.02)
    server.fault = ""
    yield
    server.fault = ""
