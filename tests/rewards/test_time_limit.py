"""A reward that hangs in the caller's thread: interrupted, named, and nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from toy_rewards import Brightness, count_ink, latent_batch

from rdm_sdk.rewards import time_limit
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.rewards.time_limit import limited


def of(hang: Callable[[], object]) -> Any:
    """A reward that hangs in its own way."""

    def stuck(images, prompts):
        hang()
        return [0.0] * len(prompts)

    return as_reward(stuck)


def reads_what_never_comes() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.recv(1)


def computes() -> None:
    while True:
        pass


HANGS: list[Callable[[], object]] = [
    lambda: time.sleep(30),
    reads_what_never_comes,
    computes,
    threading.Event().wait,
    lambda: subprocess.run([sys.executable, "-c", "import time; time.sleep(30)"], check=True),
]


@pytest.mark.parametrize("hang", HANGS, ids=["sleep", "socket", "loop", "lock", "process"])
def test_a_reward_that_hangs_is_interrupted(hang: Callable[[], object]) -> None:
    """The error names the reward and the limit, soon after it."""
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"time limit of 0.2 s \(reward_timeout") as caught:
        evaluate_reward(of(hang), latent_batch(), time_limit=0.2)
    assert "'stuck'" in caught.value.__notes__[0]
    assert time.monotonic() - started < 5


def test_it_is_skipped_where_that_is_allowed() -> None:
    """The others are judged, those that come after it as well, and with their gradients."""
    rewards = {"stuck": of(HANGS[0]), "bright": Brightness(), "ink": as_reward(count_ink)}
    result = evaluate_rewards(rewards, latent_batch(), on_error="skip", time_limit=0.2)
    assert list(result.outputs) == ["bright", "ink"]
    assert isinstance(result.skipped["stuck"], TimeoutError)
    assert result.outputs["bright"].gradient is not None


def test_one_that_catches_it_is_interrupted_again() -> None:
    """A reward that tries again for ever gets no further than its last try."""

    def stubborn() -> None:
        for wait in (30, 30):
            try:
                time.sleep(wait)
            except TimeoutError:
                continue
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        evaluate_reward(of(stubborn), latent_batch(), time_limit=0.1)
    assert time.monotonic() - started < 5


def test_nothing_is_left_behind() -> None:
    """Neither an alarm nor a handler, and somebody else's timer goes on."""
    heard: list[int] = []
    timer = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with limited("quick", 0.1):
            pass
        assert not heard
        assert 0.1 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert heard == [signal.SIGALRM]
        with limited("quick", 5):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_ctrl_c_works_meanwhile() -> None:
    """It ends the run, not the reward alone."""
    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)  # the test runner's workers ignore it
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        evaluate_reward(of(HANGS[0]), latent_batch(), on_error="skip", time_limit=20)
    signal.signal(signal.SIGINT, interrupted)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert left - 5 < signal.getitimer(signal.ITIMER_REAL)[0] <= left  # the test runner's timer, if it has one


def test_what_cannot_be_interrupted_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In another thread, as in native code, it goes on; the log says who holds up the run."""
    monkeypatch.setattr(time_limit, "GRACE", 0.05)
    with caplog.at_level(logging.ERROR):
        scores: list[Any] = []
        ask = lambda: scores.append(evaluate_reward(of(lambda: time.sleep(0.4)), latent_batch(), time_limit=0.1))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(10)
    assert "reward 'stuck' is still computing" in caplog.text
    assert scores[0].scores.tolist() == [0.0] * 6


@pytest.mark.parametrize("seconds", [None, 30.0])
def test_a_reward_in_time_is_not_disturbed(seconds: float | None) -> None:
    """Whether there is a limit or none."""
    assert evaluate_reward(Brightness(), latent_batch(), time_limit=seconds).scores.shape == (6,)
