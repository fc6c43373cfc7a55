"""Servers that fail: the run stops or goes on without the reward, as it was told, and nothing becomes a score."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from live_servers import QUICK, Faulty, Reader, Spread, remote, serving

from rdm_sdk import RDMTrainer, RewardBatch, RewardError
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.serving.asking import Failed, PatientConfig, ServerLostError, persist
from rdm_sdk.serving.remote import Remote

pytestmark = pytest.mark.usefixtures("sound")

LOST = [
    ("hang", r"did not answer within timeout=0\.5 s"),
    ("cut", "RemoteProtocolError"),
    ("503", "answered 503"),
    ("500", "answered 500: .*a proxy's page"),
]


@pytest.mark.parametrize("wanted", ["gradient", "scores"])
@pytest.mark.parametrize(("fault", "words"), LOST)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_lost_server_stops_or_skips(server: Faulty, fault: str, words: str, on_error: Any, wanted: str) -> None:
    """As `reward_on_error` says, within `max_wait`, and there is no score of 0."""
    reward = remote(server, **(QUICK | ({"retries": 1} if fault == "hang" else {})))
    server.fault = fault
    started = time.monotonic()
    options: dict[str, Any] = {"gradients_of": None if wanted == "gradient" else ()}
    rewards = {"judge": reward, "local": Legibility()}
    if on_error == "raise":
        with pytest.raises(ServerLostError, match=words):
            evaluate_rewards(rewards, Legibility().example(), **options)
    else:
        result = evaluate_rewards(rewards, Legibility().example(), on_error="skip", **options)
        assert list(result.outputs) == ["local"]
        assert isinstance(result.skipped["judge"], ServerLostError)
    assert time.monotonic() - started < QUICK["max_wait"] + 0.5


NONSENSE = [
    ("garbage", "answered nonsense for 'legibility'"),
    ("endless", "answered more than"),
    ("short", r"must be floats of shape \[8\]; got \[7\]"),
    ("infinite", "holds an infinite number"),
    ("other label", "must be floats of shape"),
    ("404", "answered 404"),
    ("401", "answered 401"),
    ("302", "answered 302"),
]


@pytest.mark.parametrize("wanted", ["gradient", "scores"])
@pytest.mark.parametrize(("fault", "words"), [*NONSENSE, ("NaN gradient", "is not finite")])
def test_nonsense_is_never_skipped_over(server: Faulty, fault: str, words: str, wanted: str) -> None:
    """It stops the run under every policy."""
    if fault == "NaN gradient" and wanted == "scores":
        pytest.skip("there is no gradient among scores")
    reward = remote(server)
    server.fault = fault
    with pytest.raises(RewardError, match=words):
        evaluate_reward(
            reward, Legibility().example(), on_error="skip", gradients_of=None if wanted == "gradient" else ()
        )


def test_what_the_servers_reward_does_wrong(server: Faulty) -> None:
    """An exception over there can be skipped; nonsense over there cannot."""
    reward = remote(server, "reader")
    images = torch.rand(2, 3, 8, 8)

    def batch(text: str) -> RewardBatch:
        return RewardBatch.from_images(images, ["1", text], columns={"extra": [0, 0]})

    with pytest.raises(ServerLostError, match="the reward 'reader' raised OSError: no route to the judge"):
        evaluate_reward(reward, batch("raise"))
    skipped = evaluate_rewards({"r": reward, "s": Spread()}, batch("raise"), on_error="skip").skipped
    assert list(skipped) == ["r"]
    with pytest.raises(RewardError, match="infinite score"):
        evaluate_reward(reward, batch("infinite"), on_error="skip")


def test_no_call_lasts_longer_than_max_wait(server: Faulty) -> None:
    """However many tries are left."""
    reward = remote(server, retries=1000, max_wait=0.7)
    server.fault = "503"
    started = time.monotonic()
    with pytest.raises(ServerLostError, match=r"max_wait=0\.7 s is over; before that, .* answered 503"):
        evaluate_reward(reward, Legibility().example(), gradients_of=())
    assert 0.7 <= time.monotonic() - started < 3


def test_a_server_that_is_busy_is_asked_again(server: Faulty) -> None:
    """Forty answers of a hundred are 503: every call succeeds in the end, with the right scores."""
    reward, expected = remote(server), evaluate_reward(Legibility(), Legibility().example()).scores
    server.fault = "40%"
    server.seen.clear()
    for _ in range(10):
        torch.testing.assert_close(evaluate_reward(reward, Legibility().example(), gradients_of=()).scores, expected)
    assert server.seen["/v1/score"] >= 16


def test_a_server_that_asks_to_wait_has_not_failed() -> None:
    """It is asked again for as long as `max_wait` lasts: a busy server spends no retries."""
    busy, calls = Failed("busy", wait=0.01), list[int]()

    async def attempt() -> bytearray | Failed:
        calls.append(1)
        return busy if len(calls) < 6 else bytearray(b"there")

    patience = PatientConfig(retries=0, max_wait=20)
    assert asyncio.run(persist(attempt, patience, "it")) == b"there"
    calls.clear()
    with pytest.raises(ServerLostError, match=r"(?=.*max_wait=0\.1 s)(?=.*busy)"):
        asyncio.run(persist(attempt, PatientConfig(retries=0, max_wait=0.1), "it"))
    busy = Failed("gone")
    calls.clear()
    with pytest.raises(ServerLostError, match=r"no answer from it .*: gone"):
        asyncio.run(persist(attempt, patience, "it"))
    assert len(calls) == 1


def test_a_batch_in_many_pieces_is_not_too_much_for_its_server() -> None:
    """A server takes 64 requests at a time and turns others away, however well it works."""

    class Slow(Spread):
        def score(self, batch: RewardBatch) -> Any:
            time.sleep(0.02)
            return super().score(batch)

    batch = RewardBatch.from_images(torch.full((160, 3, 8, 8), 0.5), group_size=2)
    with serving([Slow()]) as app:
        reward = Remote(url=app.url, retries=0)
        scores = evaluate_reward(reward, batch, chunk_size=2, gradients_of=()).scores
    assert scores.tolist() == [0.0] * 160


def test_whoever_has_gone_away_is_not_worked_for() -> None:
    """A client that waits no longer asks again: a slow server would fall behind ever further."""

    class Slow(Spread):
        def score(self, batch: RewardBatch) -> Any:
            time.sleep(0.4)
            return super().score(batch)

    slow = Slow()
    batch = RewardBatch.from_images(torch.full((12, 3, 8, 8), 0.5), group_size=2)
    with serving([slow]) as app:
        with pytest.raises(ServerLostError, match=r"within timeout=0\.2 s"):
            evaluate_reward(Remote(url=app.url, timeout=0.2, retries=0), batch, chunk_size=2, gradients_of=())
        until = time.monotonic() + 10
        while app.scorer.waiting and time.monotonic() < until:
            time.sleep(0.05)
        assert len(slow.sizes) <= 2
        assert app.scorer.alive


def test_another_server_takes_over(server: Faulty) -> None:
    """Equal servers are asked in turn; the one that answered is asked first the next time."""
    batch, expected = Legibility().example(), evaluate_reward(Legibility(), Legibility().example()).scores
    with serving([Legibility()], token="hush") as second:
        reward = remote(server, url=(second.url, server.url), max_wait=5)
        evaluate_reward(reward, batch)
        before = server.seen["/v1/score"]
        second.server.stop(at_once=True)
        for _ in range(2):
            torch.testing.assert_close(evaluate_reward(reward, batch, gradients_of=()).scores, expected)
        assert server.seen["/v1/score"] == before + 2


def test_many_calls_find_the_other_server() -> None:
    """Calls that fail at the same time do not send each other back to the server that has failed."""
    batch = RewardBatch.from_images(torch.full((8, 3, 8, 8), 0.5), group_size=2)
    with serving([Spread()]) as sound:
        dead = "http://127.0.0.1:9"
        reward = Remote(url=(dead, sound.url), retries=0)
        for first in (0, 0, 1):
            reward.client._first = first
            scores = evaluate_reward(reward, batch, chunk_size=2, gradients_of=()).scores
            assert scores.tolist() == [0.0] * 8
            assert reward.client._first == 1
        sound.fault = "garbage"
        reward.client._first = 0
        with pytest.raises(RewardError, match=f"^{sound.url} answered nonsense"):
            evaluate_reward(reward, batch, gradients_of=())


def test_a_server_that_is_killed_in_the_middle() -> None:
    """A call that is under way fails within the set time."""
    with serving([Reader(seconds=0.4)]) as app:
        reward = Remote(url=app.url, **QUICK)
        batch = RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, 0]})
        threading.Timer(0.1, app.server.stop, kwargs={"at_once": True}).start()
        started = time.monotonic()
        with pytest.raises(ServerLostError, match=r"no answer from|answered 500"):
            evaluate_reward(reward, batch)
        assert time.monotonic() - started < QUICK["max_wait"] + 1


def test_a_time_limit_of_the_run_comes_first(server: Faulty) -> None:
    """`reward_timeout` bounds a remote reward as it does every asynchronous one."""
    reward = remote(server, timeout=20, max_wait=60)
    server.fault = "hang"
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than its time limit of 0\.2 s"):
        evaluate_reward(reward, Legibility().example(), time_limit=0.2)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, object()]}), "JSON"),
        (
            lambda: RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, torch.nan]}),
            "cannot be sent",
        ),
        (lambda: RewardBatch.from_images(torch.rand(1, 3, 5000, 1), ["1"], columns={"extra": [0]}), "4096"),
        (lambda: RewardBatch.from_images(torch.rand(600, 3, 1, 1), ["1"] * 600, columns={"extra": [0] * 600}), "512"),
    ],
)
def test_what_cannot_be_sent(server: Faulty, batch: Callable[[], RewardBatch], words: str) -> None:
    """It is said before it is sent, and never skipped over."""
    server.seen.clear()
    with pytest.raises(RewardError):
        evaluate_reward(remote(server, "reader"), batch(), on_error="skip")
    assert not server.seen["/v1/score"]
    assert words


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_run_without_its_server_stops_or_goes_on(
    server: Faulty, make_trainer: Callable[..., RDMTrainer], tmp_path: Path, policy: str
) -> None:
    """After the first step the server is gone: the run stops, or goes on without that reward and counts it."""
    spec = f'remote[url="{server.url}",reward=reader,token_env=JUDGE_TOKEN,retries=0]'
    trainer = make_trainer(
        tmp_path,
        f"dm + 0.1*{spec}",
        prompts=_numbered(),
        max_steps=3,
        reward_on_error=policy,
        lr_scheduler_type="constant",
    )
    asked = trainer.step.begin

    def begin(window: Any, step: int) -> None:
        server.fault = "503" if step else ""
        asked(window, step)

    trainer.step.begin = begin  # type: ignore[method-assign]
    if policy == "raise":
        with pytest.raises(ServerLostError, match="answered 503"):
            trainer.train()
        assert trainer.state.global_step == 1
        return
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert "rewards/remote/mean" in rows[0]
    assert all("rewards/remote/mean" not in row and row["rewards/remote/skipped"] for row in rows[1:])


def _numbered() -> Any:
    return Dataset.from_dict({"prompt": [str(number) for number in range(10)], "extra": [1] * 10})
