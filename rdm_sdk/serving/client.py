"""Asking a server: in turn where there are several, again where that may help, and never beyond a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from rdm_sdk.errors import RewardError, nearest, shown
from rdm_sdk.rewards.awaiting import event_loop
from rdm_sdk.rewards.base import Capabilities, RewardBatch
from rdm_sdk.serving.answers import are_names, read_answer, read_capabilities
from rdm_sdk.serving.asking import Failed, PatientConfig, ServerLostError, exchange, open_client, persist
from rdm_sdk.serving.requests import request_parts
from rdm_sdk.serving.tensors import CONTENT_TYPE, HEADER_LIMIT, VERSION, BodyError, parse_json
from rdm_sdk.types import RewardOutput

AGAIN = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that pass."""
PIECE = 2**18
"""Bytes that are given to a connection at a time."""
AT_ONCE = 16
"""Requests of a client that are under way at a time. A batch that is judged in many pieces asks about all of them at
once: a server turns away what is too much for it, and what waits there for long runs out of its `timeout`."""

Body = Sequence[memoryview]
"""The body of a request, in parts."""


@dataclass(frozen=True)
class Described:
    """What a server says of one reward."""

    label: str
    capabilities: Capabilities
    provenance: Mapping[str, object]
    limits: Mapping[str, int]
    fields: frozenset[str]
    """What the server takes beside what every version of it took."""


class Client:
    """Asks servers of one and the same reward.

    Args:
        urls: "http://host:port"; the next one is asked where one fails.
        patience: how long, how often.
        token: shown to the servers; never to anybody else, in a message or a file.
        uds: the path of a Unix domain socket that is connected to in place of the URL's host.
        trouble: is asked, after a failure, what is known of the server; a text for the message.
    """

    def __init__(
        self,
        urls: Sequence[str],
        patience: PatientConfig,
        token: str | None = None,
        uds: str | None = None,
        trouble: Callable[[], str] = lambda: "",
    ) -> None:
        self.urls, self.patience, self.trouble = list(urls), patience, trouble
        self._headers = {"Accept-Encoding": "identity"}  # an answer unpacks to nothing
        self._headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
        self._uds = uds
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._first = 0
        """The server that a call asks first: another one as soon as a call finds that it fails."""

    # ---- What there is ------------------------------------------------------------------------------------------

    def describe(self, wanted: str | None) -> Described:
        """Return what the server says of a reward, asked once; None is the only one that it serves.

        Raises:
            RewardError: no server can be reached, the token is wrong, or it serves no such reward.
        """
        asked = self._request("GET", "/v1/rewards", None, HEADER_LIMIT)
        url, body = asyncio.run_coroutine_threadsafe(asked, event_loop()).result()
        return self._read_description(url, body, wanted)

    def _read_description(self, url: str, body: bytearray, wanted: str | None) -> Described:
        try:
            told = parse_json(body, "the answer")
            if not isinstance(told, dict) or told.get("version") != VERSION:
                raise BodyError(f"no answer of version {VERSION} of the protocol: {shown(told, 80)}")
            rewards, limits = told.get("rewards"), told.get("limits")
            if not (isinstance(rewards, dict) and rewards and isinstance(limits, dict)):
                raise BodyError("it names no rewards and limits")
            if any(type(limits.get(name)) is not int for name in ("body", "images", "side")):
                raise BodyError(f"these are no limits: {shown(limits, 120)}")
            if wanted is None and len(rewards) > 1:
                raise RewardError(f"{url} serves {', '.join(rewards)}; say which one with reward=")
            label = next(iter(rewards)) if wanted is None else wanted
            if label not in rewards:
                raise RewardError(
                    f"{url} serves no reward {label!r}.{nearest(label, rewards)} It serves: {', '.join(rewards)}"
                )
            entry = rewards[label]
            if not isinstance(entry, dict) or not isinstance(entry.get("provenance"), dict):
                raise BodyError(f"it says nothing of {label!r}")
            capabilities = read_capabilities(entry.get("capabilities"), entry.get("reads", []))
            fields = told.get("fields", [])
            if not are_names(fields):
                raise BodyError(f"these are no fields: {shown(fields, 120)}")
            return Described(label, capabilities, entry["provenance"], limits, frozenset(fields))
        except BodyError as error:
            raise RewardError(f"{url} is no server of rewards: {error}. Start one with 'rdm-sdk serve'") from error

    # ---- Scoring ------------------------------------------------------------------------------------------------

    async def ask(self, described: Described, batch: RewardBatch, images: Any, gradient: bool) -> RewardOutput:
        """Return the scores of a batch, and their gradient on the images, which are of the dtype that travels.

        Raises:
            RewardError: the server refuses the request, or answers nonsense.
            ServerLostError: it cannot be reached, or not in time, or its reward raised.
        """
        async with self._turns:  # outside of all time limits of a request, which has not begun
            return await self._ask(described, batch, images, gradient)

    async def _ask(self, described: Described, batch: RewardBatch, images: Any, gradient: bool) -> RewardOutput:
        groups = described.capabilities.scope == "group"
        try:
            body = request_parts(
                images,
                rewards=[described.label],
                prompts=batch.prompts,
                columns=_sent(batch.columns, described),
                group_size=batch.group_size if groups else None,
                gradient_dtype="F16" if images.element_size() < 4 else "F32",
                step=batch.step if "step" in described.fields else None,
            )
        except ValueError as error:  # a NaN in a column
            raise RewardError(f"what {described.label!r} is asked cannot be sent: {error}") from error
        self._check_limits(body, images, described)
        expected = HEADER_LIMIT + 8 * len(images) + (images.numel() * 4 if gradient else 0)
        url, answer = await self._request("POST", "/v1/gradient" if gradient else "/v1/score", body, expected)
        try:
            return read_answer(answer, described.label, list(images.shape), gradient)
        except BodyError as error:
            raise RewardError(f"{url} answered nonsense for {described.label!r}: {error}") from error

    def _check_limits(self, body: Body, images: Any, described: Described) -> None:
        limits = described.limits
        side, size = max(images.shape[2:]), _length(body)
        if size > limits["body"] or len(images) > limits["images"] or side > limits["side"]:
            raise RewardError(
                f"{described.label!r} was asked of {len(images)} images of {side} pixels in {size} bytes; its "
                f"server takes {limits['images']}, {limits['side']} and {limits['body']}: judge fewer at a time "
                "(reward_batch_size in a run), or start the server with higher limits"
            )

    # ---- The wire -----------------------------------------------------------------------------------------------

    async def _request(self, method: str, path: str, body: Body | None, limit: int) -> tuple[str, bytearray]:
        """Return which server answered, and the body of its answer, tried as often and as long as the patience lasts.

        Each call goes through the servers by itself, because others are under way at the same time: what those find
        out only changes where the next call begins.
        """
        tried = self._first

        async def attempt() -> bytearray | Failed:
            nonlocal tried
            answer = await self._try(self.urls[tried], method, path, body, limit)
            if isinstance(answer, Failed):
                following = (tried + 1) % len(self.urls)
                if self._first == tried:
                    self._first = following
                tried = following
            return answer

        answer = await persist(attempt, self.patience, ", ".join(self.urls), len(self.urls), self.trouble)
        return self.urls[tried], answer

    async def _try(self, url: str, method: str, path: str, body: Body | None, limit: int) -> bytearray | Failed:
        """Return the answer of a server, or why trying again may help.

        Raises:
            RewardError: asking again would not help.
            ServerLostError: its reward raised.
        """
        transport = None if self._uds is None else httpx2.AsyncHTTPTransport(verify=False, uds=self._uds)
        request: dict[str, Any] = {"headers": dict(self._headers)}
        if body is not None:
            request["headers"] |= {"Content-Type": CONTENT_TYPE, "Content-Length": str(_length(body))}
            request["content"] = _pieces(body)
        address, timeout = f"{url.rstrip('/')}{path}", self.patience.timeout
        # A client for each request: its connections belong to the loop, which may not be there to close them.
        async with open_client(url, transport=transport) as client:
            reply = await exchange(client, method, address, who=url, timeout=timeout, limit=limit, **request)
        if isinstance(reply, Failed):
            return reply
        if reply.status == 200:
            if reply.body is None:
                raise RewardError(f"{url} answered more than {limit} bytes, which cannot be what was asked")
            return reply.body
        reason, nonsense = _reason(reply.body or b"")
        if reply.status in AGAIN:
            return Failed(f"{url} answered {reply.status}: {reason}", reply.wait)
        if reply.status >= 500 and not nonsense:
            raise ServerLostError(f"{url} answered {reply.status}: {reason}")
        raise RewardError(f"{url} answered {reply.status}: {reason}")


def _length(body: Body) -> int:
    return sum(part.nbytes for part in body)


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    """Yield a body in pieces that fit into a processor's memory, and not the whole of it in one more copy."""
    for part in body:
        for start in range(0, part.nbytes, PIECE):
            yield bytes(part[start : start + PIECE])


def _reason(body: bytes | bytearray) -> tuple[str, bool]:
    """Return what a refusal says, and whether it is that the reward returned nonsense."""
    try:
        told = parse_json(body, "the answer")
    except BodyError:
        told = None
    if isinstance(told, dict) and isinstance(told.get("error"), str):
        return told["error"][:1000], told.get("nonsense") is True
    return shown(bytes(body[:200])), False


def _sent(columns: Mapping[str, list[object]], described: Described) -> dict[str, list[object]] | None:
    """Return the columns that a reward reads, or None; they must be what JSON can say."""
    capabilities = described.capabilities
    sent = {name: columns[name] for name in (*capabilities.columns, *capabilities.reads) if name in columns}
    for name, values in sent.items():
        odd = next((value for value in values if not _is_json(value)), None)
        if odd is not None:  # None itself is null
            verb = "needs" if name in capabilities.columns else "reads"
            raise RewardError(
                f"the reward {described.label!r} {verb} the column {name!r}, which holds {type(odd).__name__}; only "
                "texts, numbers, true, false, null and lists and mappings of them can be sent to a server"
                + ("" if verb == "needs" else ". It can do without: leave the column out, or rename it")
            )
    return sent or None


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    return value is None or isinstance(value, (str, int, float))
