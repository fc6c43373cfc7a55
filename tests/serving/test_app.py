"""The server, asked in this process: what it answers, whom it refuses, and what it judges together."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import httpx2
import pytest
import torch
from live_servers import Reader, Spread
from test_protocol import CONTENT_TYPE, hostile_bodies, images, png

from rdm_sdk import ConfigError, RewardBatch
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving import app as app_module
from rdm_sdk.serving.answers import read_answer
from rdm_sdk.serving.app import make_app
from rdm_sdk.serving.requests import Limits, Request, pack_request
from rdm_sdk.serving.scorer import Scorer, ScoringError, check_servable
from rdm_sdk.types import RewardOutput

ARRAYS = {"Content-Type": CONTENT_TYPE}


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    """Scores legibility and what `live_servers` has."""
    made = Scorer(resolve_rewards([Legibility(), Reader(), Spread()]), "cpu")
    yield made
    made.close()


class Asking:
    """Sends requests to an application in this process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **options)

    def __call__(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return asyncio.run(self.send(method, path, **options))

    def together(self, calls: list[Coroutine[Any, Any, httpx2.Response]]) -> list[httpx2.Response]:
        async def gathered() -> list[httpx2.Response]:
            return await asyncio.gather(*calls)

        return asyncio.run(gathered())


@pytest.fixture
def ask(scorer: Scorer) -> Asking:
    return Asking(make_app(scorer, Limits(body=2**20, images=16, side=64)))


def test_scores_and_gradients(ask: Asking) -> None:
    """They are those of the reward itself."""
    batch = Legibility().example()
    expected = evaluate_reward(Legibility(), batch)
    body = pack_request(batch.latents, prompts=batch.prompts, rewards=["legibility"])
    shape = list(batch.latents.shape)
    got = read_answer(ask("POST", "/v1/gradient", content=body, headers=ARRAYS).content, "legibility", shape, True)
    torch.testing.assert_close(got.scores, expected.scores)
    torch.testing.assert_close(got.gradient, expected.gradient)
    alone = ask("POST", "/v1/score", content=body, headers=ARRAYS)
    assert alone.headers["content-type"] == CONTENT_TYPE
    torch.testing.assert_close(read_answer(alone.content, "legibility", shape, False).scores, expected.scores)
    assert b"gradient" not in alone.content


def test_json_with_pictures(ask: Asking) -> None:
    """For whoever has PNG files and no arrays; what does not apply is null."""
    message = {"images": [png()] * 2, "prompts": ["3", "none"], "columns": {"extra": [1, 2]}, "rewards": ["reader"]}
    answer = ask("POST", "/v1/score", json=message)
    assert answer.json() == {"version": 1, "scores": {"reader": [pytest.approx(4 + 128 / 3 / 255), None]}}
    assert ask("POST", "/v1/gradient", json=message).status_code == 415
    loud = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert ask("POST", "/v1/score", content=json.dumps(message), headers=loud).json() == answer.json()


def test_all_that_is_served_is_asked_by_default(ask: Asking) -> None:
    """A request without `rewards` asks all; each judges what it can."""
    message = {"images": [png()] * 2, "prompts": ["1", "20"], "columns": {"extra": [0, 0]}, "group_size": 2}
    scores = ask("POST", "/v1/score", json=message).json()["scores"]
    assert list(scores) == ["legibility", "reader", "spread"]
    assert scores["legibility"][1] is None  # the prompt names no digit
    assert scores["spread"] == [0, 0]


REFUSED = [
    ({"rewards": ["legibilty"]}, 404, "no reward 'legibilty' here. Did you mean 'legibility'?"),
    ({"rewards": ["reader"]}, 422, "needs the column 'extra'"),
    ({"rewards": ["legibility"], "prompts": None}, 422, "reads prompts; send one per image"),
    ({"rewards": ["spread"]}, 422, "'spread' compares the samples of one prompt; send group_size, at least 2"),
]


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED)
def test_what_no_reward_can_answer_is_refused(ask: Asking, fields: Any, status: int, words: str) -> None:
    """Before anything is scored."""
    body = pack_request(images(), **({"prompts": ["a", "b"]} | fields))
    answer = ask("POST", "/v1/score", content=body, headers=ARRAYS)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_no_gradient_where_there_is_none(ask: Asking) -> None:
    """It is not made up of zeros."""
    body = pack_request(images(), prompts=["1", "2"], columns={"extra": [0, 0]}, rewards=["reader"])
    answer = ask("POST", "/v1/gradient", content=body, headers=ARRAYS)
    assert answer.status_code == 422
    assert "'reader' has no gradient" in answer.json()["error"]


@pytest.mark.parametrize(("prompt", "nonsense"), [("raise", False), ("infinite", True)])
def test_a_reward_that_fails_is_no_score(ask: Asking, prompt: str, nonsense: bool) -> None:
    """The answer is an error that says which kind it is, and the next request is answered."""
    message = {"images": [png()], "prompts": [prompt], "columns": {"extra": [0]}, "rewards": ["reader"]}
    answer = ask("POST", "/v1/score", json=message)
    assert answer.status_code == 500
    assert answer.json()["nonsense"] is nonsense
    assert "'reader'" in answer.json()["error"]
    assert ask("POST", "/v1/score", json=message | {"prompts": ["1"]}).status_code == 200


def test_what_is_served_is_described(ask: Asking) -> None:
    """Names, capabilities, provenance and limits."""
    told = ask("GET", "/v1/rewards").json()
    assert told["version"] == 1
    assert told["limits"] == {"body": 2**20, "images": 16, "side": 64}
    assert list(told["rewards"]) == ["legibility", "reader", "spread"]
    assert told["rewards"]["reader"]["capabilities"]["columns"] == ["extra"]
    assert told["rewards"]["legibility"]["provenance"]["preprocessing"] == "gray, area-resized to 16x16"
    assert ask("GET", "/health").json() == {"status": "ok", "version": 1}


def test_metrics(ask: Asking) -> None:
    """In the format of Prometheus: requests by status, images."""
    ask("POST", "/v1/score", content=pack_request(images(), rewards=["spread"], group_size=2), headers=ARRAYS)
    ask("POST", "/v1/score", content=b"", headers=ARRAYS)
    text = ask("GET", "/metrics").text
    assert 'rdm_requests_total{endpoint="/v1/score",status="200"} 1\n' in text
    assert 'rdm_requests_total{endpoint="/v1/score",status="400"} 1\n' in text
    assert "rdm_images_total " in text


def test_the_openapi_page_knows_the_endpoints(ask: Asking) -> None:
    """Their docstrings are the documentation of the API."""
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/score", "/v1/gradient", "/v1/rewards", "/health", "/metrics"}
    assert "safetensors" in paths["/v1/score"]["post"]["description"]
    assert CONTENT_TYPE in paths["/v1/score"]["post"]["requestBody"]["content"]


# ---- Who may ask, and how much --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/score", "/v1/gradient", "/v1/rewards", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "secret", "bearer secret", "Bearer secret2"])
def test_nobody_gets_in_without_the_token(scorer: Scorer, path: str, header: str | None) -> None:
    """Whatever is asked; /health alone is open."""
    ask = Asking(make_app(scorer, token="secret"))
    headers = {} if header is None else {"Authorization": header}
    for method in ("GET", "POST"):
        answer = ask(method, path, headers=headers)
        assert answer.status_code == 401
        assert "secret" not in answer.text
    assert ask("GET", "/health").status_code == 200
    assert ask("GET", "/v1/rewards", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_nothing_is_read_of_what_is_too_long(ask: Asking) -> None:
    """A length that is too large is refused before the body; one that is not declared, once the limit is reached."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(2**18)

    answer = ask("POST", "/v1/score", content=endless(), headers=ARRAYS)
    assert answer.status_code == 413
    answer = ask("POST", "/v1/score", content=endless(), headers=ARRAYS | {"Content-Length": str(2**30)})
    assert answer.status_code == 413
    assert "1048576" in answer.json()["error"]


@pytest.mark.parametrize(("header", "parts"), [([], 5), ([(b"content-length", b"9999999")], 0)])
def test_reading_stops_at_the_limit(scorer: Scorer, header: list[Any], parts: int) -> None:
    """The server asks for no more of a body than it takes, and for nothing of one whose length is too large."""
    received, sent = [], []

    async def receive() -> dict[str, Any]:
        received.append(1)
        return {"type": "http.request", "body": bytes(2**18), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score"}
    scope |= {
        "query_string": b"",
        "headers": [(b"content-type", CONTENT_TYPE.encode()), *header],
        "server": ("here", 80),
    }
    asyncio.run(make_app(scorer, Limits(body=2**20))(scope, receive, send))
    assert sent[0]["status"] == 413
    assert len(received) == parts


@pytest.mark.parametrize("length", ["-1", "abc", "1e3"])
def test_a_length_that_is_none(ask: Asking, length: str) -> None:
    """It is refused, too."""
    assert ask("POST", "/v1/score", content=b"x", headers=ARRAYS | {"Content-Length": length}).status_code == 413


def test_a_slow_body_is_given_up(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends a byte now and then holds no place for long."""
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.1)

    async def drops() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(5)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score"}
    scope |= {"query_string": b"", "headers": [], "server": ("here", 80)}
    asyncio.run(ask.app(scope, receive, send))
    assert sent[0]["status"] == 408


def test_too_many_are_told_to_come_back(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a header that says when."""
    monkeypatch.setattr(app_module, "MAX_WAITING", 0)
    answer = ask("POST", "/v1/score", content=pack_request(images()), headers=ARRAYS)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_server_survives_hostile_bodies() -> None:
    """Two hundred of them, through the whole application, some at the same time."""
    scorer = Scorer(resolve_rewards([Spread()]), "cpu")
    ask, bodies = Asking(make_app(scorer, Limits(body=2**20, images=16, side=64))), hostile_bodies(200)
    statuses = []
    for start in range(0, len(bodies), 20):
        some = bodies[start : start + 20]
        calls = [ask.send("POST", "/v1/score", content=body, headers={"Content-Type": form}) for body, form in some]
        statuses += [answer.status_code for answer in ask.together(calls)]
    assert all(status == 200 or 400 <= status < 500 for status in statuses)
    assert sum(status >= 400 for status in statuses) > 150
    assert ask("GET", "/health").status_code == 200
    scorer.close()


# ---- What is judged together ----------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[tuple[Scorer, Reader, Spread, threading.Event]]:
    """A scorer whose thread is kept busy by a first request until the event is set."""
    reader, spread, go = Reader(), Spread(), threading.Event()

    def wait(images: Any, prompts: Any) -> list[float]:
        go.wait(10)
        return [0.0] * len(images)

    scorer = Scorer(resolve_rewards([reader, spread, wait]), "cpu", batch_size=8)
    scorer.submit(Request(images(1), rewards=("wait",)), False)
    yield scorer, reader, spread, go
    go.set()
    scorer.close()


def request(number: int, count: int = 1, side: int = 8, label: str = "reader", **fields: Any) -> Request:
    shown = {"prompts": [str(number)] * count, "columns": {"extra": [100] * count}} | fields
    return Request(torch.zeros(count, 3, side, side), rewards=(label,), **shown)


def test_what_waits_is_judged_together(busy: Any) -> None:
    """Up to the batch size, images of one size, and everybody gets what belongs to them."""
    scorer, reader, _, go = busy
    futures = [scorer.submit(request(0), False)]
    other = scorer.submit(request(50, side=16), False)  # of another size, in between
    futures += [scorer.submit(request(i, 1 + i % 2), False) for i in range(1, 6)]
    go.set()
    for i, future in enumerate(futures):
        assert future.result(5)["reader"].scores.tolist() == [100.0 + i] * (1 + i % 2)
    assert other.result(5)["reader"].scores.tolist() == [150.0]
    assert sorted(reader.sizes) == [1, 2, 7]  # 1 + 2 + 1 + 2 + 1; another 2 would be 9


def test_large_images_become_floats_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups, and what is answered is what all of them together would be."""
    reader, spread, several = Reader(), Spread(), torch.rand(9, 3, 8, 8)
    eight_bits = (several * 255).round().to(torch.uint8)
    scorer = Scorer(resolve_rewards([reader, spread]), "cpu")
    fields: dict[str, Any] = {"prompts": list("012345678"), "columns": {"extra": list(range(9))}}
    whole = scorer.submit(Request(eight_bits, group_size=3, **fields), False).result(5)
    monkeypatch.setattr("rdm_sdk.serving.scorer.FLOAT_BYTES", 4 * 192 * 2)
    parts = scorer.submit(Request(eight_bits, group_size=3, **fields), False).result(5)
    slopes = scorer.submit(Request(several, group_size=3, rewards=("spread",)), True).result(5)
    scorer.close()
    assert reader.sizes == spread.sizes[:4] == [9, 3, 3, 3]
    assert whole["reader"].scores.tolist() == pytest.approx(
        [2 * i + float(eight_bits[i].float().mean() / 255) for i in range(9)]
    )
    for label in ("reader", "spread"):
        torch.testing.assert_close(parts[label].scores, whole[label].scores)
    torch.testing.assert_close(slopes["spread"].scores, Spread().score(RewardBatch.from_images(several, None, 3)))
    assert slopes["spread"].gradient is not None
    assert slopes["spread"].gradient.shape == several.shape


def test_groups_are_never_judged_with_others(busy: Any) -> None:
    """A group's scores hang on the group, so each request is judged by itself."""
    scorer, _, spread, go = busy
    futures = [scorer.submit(request(0, 2, label="spread", group_size=2), False) for _ in range(3)]
    go.set()
    for future in futures:
        future.result(5)
    assert spread.sizes == [2, 2, 2]


def test_one_that_fails_fails_alone(busy: Any) -> None:
    """The others of its batch are judged without it."""
    scorer, _, _, go = busy
    futures = [scorer.submit(request(0, prompts=[text]), False) for text in ("1", "raise", "none", "infinite")]
    go.set()
    assert futures[0].result(5)["reader"].scores.tolist() == [101.0]
    with pytest.raises(ScoringError, match="raised OSError: no route to the judge"):
        futures[1].result(5)
    assert futures[2].result(5)["reader"].scores.isnan().all()
    with pytest.raises(ScoringError, match="infinite score"):
        futures[3].result(5)


def test_closing_answers_what_waits(busy: Any) -> None:
    """And takes nothing more."""
    scorer, _, _, go = busy
    future = scorer.submit(request(3), False)
    threading.Timer(0.05, go.set).start()
    scorer.close()
    assert future.result(0)["reader"].scores.tolist() == [103.0]
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(request(3), False)


def test_a_request_that_is_given_up_is_not_scored(busy: Any) -> None:
    """Whoever has gone away is not worked for."""
    scorer, reader, _, go = busy
    assert scorer.submit(request(1), False).cancel()
    go.set()
    assert scorer.submit(request(2), False).result(5)["reader"].scores.tolist() == [102.0]
    assert reader.sizes == [1]


def test_it_never_dies(busy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody thought of is an error of that request."""
    scorer, _, _, go = busy

    def broken(jobs: Any) -> dict[str, RewardOutput]:
        raise MemoryError("all of it")

    monkeypatch.setattr(scorer, "_evaluate", broken)
    future = scorer.submit(request(1), False)
    go.set()
    with pytest.raises(ScoringError, match="MemoryError: all of it"):
        future.result(5)
    monkeypatch.undo()
    assert scorer.submit(request(2), False).result(5)["reader"].scores.tolist() == [102.0]


def test_health_knows_a_scorer_that_has_ended() -> None:
    """Whoever watches the server can start it again."""
    scorer = Scorer(resolve_rewards([Spread()]), "cpu")
    scorer.close()
    assert Asking(make_app(scorer))("GET", "/health").status_code == 503


def test_what_cannot_be_served() -> None:
    """Rewards of a run's models, and of latents, are named before anything is loaded."""
    with pytest.raises(ConfigError, match="'dm' needs the models of a training run"):
        check_servable(resolve_rewards("dm"))
