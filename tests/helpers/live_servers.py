"""Servers of rewards in this process, and servers that fail on request."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardOutput
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving.answers import pack_answer
from rdm_sdk.serving.app import make_app
from rdm_sdk.serving.local import App
from rdm_sdk.serving.local import ThreadedServer as LiveServer
from rdm_sdk.serving.remote import Remote
from rdm_sdk.serving.requests import Limits
from rdm_sdk.serving.scorer import Scorer
from rdm_sdk.serving.tensors import CONTENT_TYPE


@contextmanager
def serving(rewards: Any, token: str | None = None, limits: Limits | None = None, **faults: Any) -> Iterator[Faulty]:
    """Serve rewards for the duration of the block; yields the application, with its `url` and `server`."""
    scorer = Scorer(resolve_rewards(rewards), "cpu")
    app = Faulty(make_app(scorer, limits, token), **faults)
    app.scorer = scorer
    live = LiveServer(app)
    app.server, app.url = live, live.url
    try:
        yield app
    finally:
        live.stop(at_once=True)
        scorer.close()


class Faulty:
    """Passes requests on, or answers those that score as `fault` says."""

    url: str
    server: LiveServer
    scorer: Scorer

    def __init__(self, app: App, fault: str = "") -> None:
        self.app, self.fault = app, fault
        self.seen: Counter[str] = Counter()
        """Paths to how often they were asked for."""
        self.label = "legibility"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        self.seen[path] += 1
        if not self.fault or path not in ("/v1/score", "/v1/gradient"):
            await self.app(scope, receive, send)
            return
        if self.fault == "40%":  # two of each five
            if self.seen[path] % 5 in (1, 3):
                await respond(send, 503, b'{"error": "busy"}')
            else:
                await self.app(scope, receive, send)
            return
        body = await whole(receive)
        if self.fault == "hang":
            await asyncio.sleep(30)
        elif self.fault == "cut":
            start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]}
            await send(start)
            await send({"type": "http.response.body", "body": b"abc", "more_body": False})
        elif self.fault.isdecimal():
            await respond(send, int(self.fault), b"<html>a proxy's page</html>")
        else:
            await respond(send, 200, self.wrong(body, path.endswith("gradient")))

    def wrong(self, body: bytes, gradient: bool) -> bytes:
        """Return an answer of status 200 that is none."""
        if self.fault == "garbage":
            return b"<html>garbage</html>"
        if self.fault == "endless":
            return bytes(2**25)
        count, side = 8, 32
        scores, values = torch.full((count,), 0.5), torch.ones(count, 3, side, side)
        if self.fault == "short":
            scores = scores[:-1]
        elif self.fault == "infinite":
            scores[0] = torch.inf
        elif self.fault == "all NaN":
            scores[:] = torch.nan
        elif self.fault == "NaN gradient":
            values[0] = torch.nan
        elif self.fault == "other label":
            return pack_answer({"other": RewardOutput(scores, values)})
        return pack_answer({self.label: RewardOutput(scores, values if gradient else None)})


async def whole(receive: Any) -> bytes:
    """Return a request's body."""
    parts, more = b"", True
    while more:
        message = await receive()
        parts += message.get("body", b"")
        more = message.get("more_body", False)
    return parts


async def respond(send: Any, status: int, body: bytes) -> None:
    """Send an answer."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", CONTENT_TYPE.encode())]})
    await send({"type": "http.response.body", "body": body})


class Spread(Reward):
    """How far an image's mean is from its group's, squared; counts its calls."""

    name = "spread"
    capabilities = Capabilities(gradient="autograd", scope="group")

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def score(self, batch: RewardBatch) -> Tensor:
        self.sizes.append(len(batch))
        means = batch.images.mean(dim=(1, 2, 3)).reshape(-1, batch.group_size)
        return (means - means.mean(dim=1, keepdim=True)).flatten() ** 2


class Reader(Reward):
    """The number in a prompt, plus a column, plus the image's mean, or what a prompt asks for; counts its calls."""

    name = "reader"
    capabilities = Capabilities(prompts=True, columns=("extra",))

    class Config(RewardConfig):
        seconds: float = 0.0
        """How long a call takes."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.sizes: list[int] = []

    def score(self, batch: RewardBatch) -> Tensor:
        self.sizes.append(len(batch))
        time.sleep(self.config.seconds)
        if "raise" in batch.prompts:
            raise OSError("no route to the judge")
        if "infinite" in batch.prompts:
            return torch.full((len(batch),), torch.inf)
        numbers: Sequence[Any] = batch.columns["extra"]
        scores = [
            float("nan") if prompt == "none" else float(prompt) + extra
            for prompt, extra in zip(batch.prompts, numbers, strict=True)
        ]
        return torch.tensor(scores) + batch.images.mean(dim=(1, 2, 3))


QUICK: dict[str, Any] = {"timeout": 0.5, "retries": 2, "max_wait": 1.5}
"""A client that gives up soon."""


def remote(server: Faulty, reward: str | None = "legibility", **options: Any) -> Remote:
    return Remote(
        **(
            {"timeout": 20.0, "retries": 2, "max_wait": 40.0}
            | {"url": server.url, "reward": reward, "token_env": "JUDGE_TOKEN"}
            | options
        )
    )
