"""Asking any server over HTTP: again where that may help, and never beyond a bound."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import Field

from rdm_sdk.errors import RDMError, RewardError, shown
from rdm_sdk.rewards.base import RewardConfig

BACKOFF = 0.1
"""Seconds before the second try, at most; doubled for each further one, up to `BACKOFF_LIMIT`."""
BACKOFF_LIMIT = 5.0
ERROR_LIMIT = 2**16
"""Bytes of a refusal that are read."""

_JITTER = random.Random()  # the run's random state is not touched


class ServerLostError(RDMError, ConnectionError):
    """A reward's server that cannot be reached, or does not answer in time; `reward_on_error` says what it does."""


class PatientConfig(RewardConfig):
    """Options of a reward that asks a server: how long a client waits, and how often it tries."""

    timeout: float = Field(default=60.0, gt=0)
    """Seconds that one try may take."""
    retries: int = Field(default=4, ge=0)
    """Further tries where the first fails. A server that asks to wait (`Retry-After`) is busy, and has not failed."""
    max_wait: float = Field(default=300.0, gt=0)
    """Seconds that all tries of one request may take together."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    body: bytearray | None
    """None if it was longer than it may be."""
    wait: float
    """Seconds that it asks to wait before the next request; 0 if it does not."""


@dataclass(frozen=True)
class Failed:
    """A try that failed, where another one may help."""

    reason: str
    wait: float = 0.0
    """Seconds that the server asks to wait."""


def check_address(url: str) -> None:
    """Raise `ValueError` unless a text is the address of a server that may be written into a spec."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is read when it is asked for
    except ValueError as error:
        raise ValueError(f"{shown(url, 80)} is no address such as 'http://judge:8000': {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{shown(url, 80)} is no address such as 'http://judge:8000'")
    if parts.username or parts.password or parts.query:
        raise ValueError("an address may hold no password and no query; name the variable that holds the secret")


def read_secret(option: str, variable: str | None) -> str | None:
    """Return what the environment variable that an option names holds; None if the option names none.

    Raises:
        RewardError: the variable is not set, or holds what no token can.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "")
    if not secret or not secret.isascii() or not secret.isprintable():
        raise RewardError(
            f"{option}={variable!r}: the environment variable is not set, or holds what no token can; export it where "
            "the run is started"
        )
    return secret


def open_client(url: str, **options: Any) -> httpx2.AsyncClient:
    """Return a client for the server at an address, without time limits; `exchange` has them.

    Without `verify`, a client reads all certificates of this machine, for a tenth of a second.
    """
    verify = _tls() if url.startswith("https") else False
    return httpx2.AsyncClient(verify=verify, timeout=None, **options)


async def exchange(
    client: httpx2.AsyncClient, method: str, url: str, *, who: str, timeout: float, limit: int, **request: Any
) -> Reply | Failed:
    """Return what a server answers to one request, or why there is no answer.

    Args:
        client: asks.
        method: "GET" or "POST".
        url: the whole address.
        who: what messages call the server.
        timeout: seconds that it may take.
        limit: bytes that an answer of status 200 may have.
        **request: what else `httpx2.AsyncClient.stream` is given.
    """
    try:
        async with asyncio.timeout(timeout), client.stream(method, url, **request) as response:
            status = response.status_code
            body = await _read(response, limit if status == 200 else ERROR_LIMIT)
            return Reply(status, body, asked_to_wait(response.headers))
    except TimeoutError:
        return Failed(f"{who} did not answer within timeout={timeout:g} s")
    except httpx2.TransportError as error:
        return Failed(f"{who}: {type(error).__name__} {error}")


async def persist(
    attempt: Callable[[], Awaitable[bytearray | Failed]],
    patience: PatientConfig,
    who: str,
    servers: int = 1,
    trouble: Callable[[], str] = lambda: "",
) -> bytearray:
    """Return what an attempt returns in the end, tried as often and as long as the patience lasts.

    Args:
        attempt: asks once; it raises where asking again would not help.
        patience: how long, how often.
        who: what messages call the servers.
        servers: how many equal ones there are: attempts that follow each other without a pause.
        trouble: is asked, after a failure, what else is known; a text for the message.

    Raises:
        ServerLostError: nothing came of it.
    """
    last, started, failures = "nothing was tried", time.monotonic(), 0
    bound = asyncio.timeout(patience.max_wait)
    try:
        async with bound:
            while True:
                wait = 0.0
                for _ in range(servers):
                    answer = await attempt()
                    if not isinstance(answer, Failed):
                        return answer
                    last, wait = answer.reason, answer.wait
                if not wait:
                    failures += 1
                if wait > patience.max_wait - (time.monotonic() - started):
                    last += f"; it asks to wait {wait:g} s, which max_wait={patience.max_wait:g} s does not allow"
                    break
                if failures > patience.retries:
                    break
                longest = min(BACKOFF * 2 ** min(max(failures - 1, 0), 10), BACKOFF_LIMIT)
                await asyncio.sleep(wait + _JITTER.uniform(longest / 2, longest))  # not all clients at once
    except TimeoutError:
        if not bound.expired():
            raise
        last = f"max_wait={patience.max_wait:g} s is over; before that, {last}"
    tries = f"after {time.monotonic() - started:.1f} s and up to {patience.retries + 1} tries each"
    raise ServerLostError(f"no answer from {who} {tries}: {last}{trouble()}")


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a `Retry-After` asks to wait, from now, 0 or more; 0 where there is none to be read.

    It holds seconds or a date (RFC 9110, 10.2.3).
    """
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])  # 30 years
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max((date.astimezone(UTC) - datetime.now(UTC)).total_seconds(), 0.0)


async def _read(response: httpx2.Response, limit: int) -> bytearray | None:
    """Return the body of a response, None if it is longer than a limit."""
    parts = bytearray()
    async for part in response.aiter_raw():
        parts += part
        if len(parts) > limit:
            return None
    return parts


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
