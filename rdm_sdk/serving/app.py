"""Rewards behind HTTP: who may ask, how much, and what is answered."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from rdm_sdk._version import __version__
from rdm_sdk.serving.answers import described_capabilities, pack_answer
from rdm_sdk.serving.requests import FIELDS, FORMS, JSON, Limits, Request, RequestError, form_of, parse_request
from rdm_sdk.serving.scorer import Answer, Scorer, ScoringError
from rdm_sdk.serving.tensors import CONTENT_TYPE, VERSION

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/health", "/docs", "/openapi.json")
"""What is answered without a token."""
MAX_WAITING = 64
"""Requests in the server at a time; more are told to come back."""
BODY_SECONDS = 120.0
"""How long a body may take to arrive."""
_BODY = {"content": {form: {"schema": {"type": "string", "format": "binary"}} for form in FORMS}, "required": True}


class TokenGuard:
    """Lets nobody in without the token, before anything of a request is read.

    Args:
        app: what is guarded.
        token: what must follow "Bearer "; None lets everybody in.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.expected is not None and scope["path"] not in OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = error_response(401, "the token is missing or wrong; send 'Authorization: Bearer TOKEN'")
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def error_response(status: int, message: str, **more: Any) -> JSONResponse:
    """Return what every refusal looks like: `{"error": why}`."""
    headers = {"Retry-After": "1"} if status == 503 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": message} | more, status, headers)


class Service:
    """The endpoints; the scorer is closed by whoever made it."""

    def __init__(self, scorer: Scorer, limits: Limits) -> None:
        self.scorer, self.limits = scorer, limits
        self.inside = 0
        self.requests: Counter[tuple[str, int]] = Counter()
        """Endpoint and status to how often."""

    # ---- Scoring ------------------------------------------------------------------------------------------------

    async def score(self, request: HttpRequest) -> Response:
        """Score images.

        The body is a safetensors file with one array `images` ([N, 3, H, W] in [0, 1]; F16, F32, or U8 of 0 to 255),
        and a JSON text in its metadata under `rdm`: version, prompts, columns, group_size, rewards, step. Or it is
        that JSON with `images` as a list of PNG files in base64; scores are then JSON, null where a reward does not
        apply.
        """
        return await self._counted("/v1/score", request, gradients=False)

    async def gradient(self, request: HttpRequest) -> Response:
        """Score images, and return the gradient of the sum of the scores on the images; arrays only."""
        return await self._counted("/v1/gradient", request, gradients=True)

    async def _counted(self, endpoint: str, request: HttpRequest, gradients: bool) -> Response:
        if self.inside >= MAX_WAITING:
            response: Response = error_response(503, "too many requests are being answered; come back later")
        else:
            self.inside += 1
            try:
                response = await self._answered(request, gradients)
            except RequestError as error:
                response = error_response(error.status, str(error))
            except ScoringError as error:
                response = error_response(500, str(error), nonsense=error.nonsense)
            finally:
                self.inside -= 1
        self.requests[endpoint, response.status_code] += 1
        return response

    async def _answered(self, request: HttpRequest, gradients: bool) -> Response:
        form = form_of(request.headers.get("content-type", ""))
        as_json = form == JSON
        if gradients and as_json:
            raise RequestError(415, f"gradients travel as arrays; send {CONTENT_TYPE}")
        body = await self._body(request)
        asked = await run_in_threadpool(parse_request, body, form, self.limits)
        del body
        answer = await self._scored(request, asked, gradients)
        if as_json:
            return JSONResponse({"version": VERSION} | _as_json(answer))
        return Response(await run_in_threadpool(pack_answer, answer, asked.gradient_dtype), media_type=CONTENT_TYPE)

    async def _scored(self, request: HttpRequest, asked: Request, gradients: bool) -> Answer:
        """Return what the scorer says; a request whose client is gone before its turn comes loses that turn.

        A client that waits no longer asks again: with its old requests to score, a slow server would never catch up.
        """
        scoring = asyncio.wrap_future(self.scorer.submit(asked, gradients))
        leaving = asyncio.ensure_future(_gone(request))
        either: tuple[asyncio.Future[Any], ...] = (scoring, leaving)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not scoring.done():
                scoring.cancel()
        if scoring.cancelled():
            raise RequestError(499, "the connection was closed before the images were scored")
        return scoring.result()

    async def _body(self, request: HttpRequest) -> bytearray:
        """Return the body, of which no more is read than the limit allows."""
        too_much = RequestError(413, f"the body has more than {self.limits.body} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body:
            raise too_much
        parts = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts += part
                    if len(parts) > self.limits.body:
                        raise too_much
        except ClientDisconnect as error:
            raise RequestError(400, "the connection was closed before the body had arrived") from error
        except TimeoutError as error:
            raise RequestError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
        return parts

    # ---- What there is ------------------------------------------------------------------------------------------

    async def describe(self) -> JSONResponse:
        """Return what is served: names, capabilities, provenance, and what a request may hold."""
        rewards = {
            label: {
                "capabilities": described_capabilities(weighted.capabilities),
                "provenance": _as_told(weighted.reward.provenance()),
                "reads": list(weighted.capabilities.reads),  # here, where older clients do not look
            }
            for label, weighted in self.scorer.rewards.items()
        }
        limits = {"body": self.limits.body, "images": self.limits.images, "side": self.limits.side}
        told = {"version": VERSION, "sdk_version": __version__, "limits": limits, "fields": FIELDS}
        return JSONResponse(told | {"rewards": rewards})

    async def health(self) -> JSONResponse:
        """Return that the server is there; no token is asked for."""
        if not self.scorer.alive:
            return error_response(503, "the thread that scores has ended; start the server again")
        return JSONResponse({"status": "ok", "version": VERSION})

    async def metrics(self) -> PlainTextResponse:
        """Return figures in the text format of Prometheus."""
        counts = self.scorer.counts
        lines = [
            f'rdm_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
            for (endpoint, status), count in sorted(self.requests.items())
        ]
        lines += [
            f"rdm_images_total {counts.images}",
            f"rdm_batches_total {counts.batches}",
            f"rdm_scoring_seconds_total {counts.seconds:.6f}",
            f"rdm_waiting_requests {self.scorer.waiting}",
            f"rdm_requests_inside {self.inside}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")


async def _gone(request: HttpRequest) -> None:
    """Return when the client of a request, whose body has been read, has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_told(provenance: Mapping[str, object]) -> Any:
    """Return a reward's provenance as JSON can say it; what it cannot, an infinite option too, becomes a text."""
    return json.loads(json.dumps(provenance, default=str), parse_constant=str)


def _as_json(answer: Answer) -> dict[str, Any]:
    """Return scores by label, and what rewards logged, where they did."""
    scores = {label: _listed(output.scores) for label, output in answer.items()}
    logged = {
        label: {name: _listed(values) for name, values in output.logged.items()}
        for label, output in answer.items()
        if output.logged
    }
    return {"scores": scores} | ({"logged": logged} if logged else {})


def _listed(scores: Any) -> list[float | None]:
    return [None if value != value else value for value in scores.tolist()]


def make_app(scorer: Scorer, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Return the ASGI application that serves a scorer's rewards."""
    service = Service(scorer, limits or Limits())
    app = FastAPI(title="rdm-sdk rewards", version=str(VERSION), redoc_url=None)
    app.add_middleware(TokenGuard, token=token)
    posts: dict[str, Any] = {"methods": ["POST"], "openapi_extra": {"requestBody": _BODY}, "response_class": Response}
    app.add_api_route("/v1/score", service.score, response_model=None, **posts)
    app.add_api_route("/v1/gradient", service.gradient, response_model=None, **posts)
    for path, endpoint in (("/v1/rewards", service.describe), ("/health", service.health)):
        app.add_api_route(path, endpoint, response_model=None)
    app.add_api_route("/metrics", service.metrics, response_model=None, response_class=PlainTextResponse)
    return app
