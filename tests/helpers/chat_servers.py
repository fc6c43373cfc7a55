"""A judge behind OpenAI's API, in this process, which answers by what it sees and fails on request."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from live_servers import LiveServer, whole
from PIL import Image

Body = dict[str, Any]


def brightness(body: Body) -> float:
    """Return the mean of the picture in a request, in [0, 1]; it must be a PNG file in RGB."""
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    picture = Image.open(BytesIO(base64.b64decode(data)))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return float(np.asarray(picture).mean() / 255)


def question(body: Body) -> str:
    """Return the text of a request."""
    text: str = body["messages"][0]["content"][1]["text"]
    return text


def completion(text: str, likeliest: dict[str, float] | None = None, finish: str = "stop") -> Body:
    """Return a chat completion; `likeliest` maps tokens to probabilities."""
    logprobs = None
    if likeliest is not None:
        top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in likeliest.items()]
        logprobs = {"content": [top[0] | {"top_logprobs": top}], "refusal": None}
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "judge-7b", "choices": [choice]}


class ChatServer:
    """Answers GET /v1/models and POST /v1/chat/completions.

    `answer` maps a request to a completion, or to bytes that are none; `faults` are answered first, one a request, as
    (status, headers, body), or a number of seconds that nothing is answered for.
    """

    url: str
    server: LiveServer

    def __init__(self, answer: Callable[[Body], Body | bytes]) -> None:
        self.answer = answer
        self.models = ["judge-7b", "other"]
        self.asked: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[tuple[int, dict[str, str], bytes] | float] = []
        self.under_way = self.most = 0
        self.seconds: Callable[[int], float] = lambda number: 0.0
        """How long the answer to the n-th request takes."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body = await whole(receive)
        place = scope["method"], scope["path"]
        if place == ("GET", "/v1/models"):
            entries = [{"id": name, "object": "model"} for name in self.models]
            await respond(send, 200, json.dumps({"object": "list", "data": entries}).encode())
        elif place == ("POST", "/v1/chat/completions"):
            self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
            self.asked.append(json.loads(body))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                await self._complete(self.asked[-1], len(self.asked), send)
            finally:
                self.under_way -= 1
        else:
            await respond(send, 404, b'{"detail": "Not Found"}')

    async def _complete(self, body: Body, number: int, send: Any) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            await respond(send, fault[0], fault[2], fault[1])
            return
        await asyncio.sleep(self.seconds(number) if fault is None else fault)
        answer = self.answer(body)
        await respond(send, 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())


async def respond(send: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Send an answer."""
    given = {"content-type": "application/json"} | (headers or {})
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def chatting(answer: Callable[[Body], Body | bytes]) -> Iterator[ChatServer]:
    """Serve a judge for the duration of the block."""
    app = ChatServer(answer)
    live = LiveServer(app)
    app.server, app.url = live, f"{live.url}/v1"
    try:
        yield app
    finally:
        live.stop(at_once=True)
