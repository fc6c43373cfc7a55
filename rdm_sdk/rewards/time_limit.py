"""A limit on the time of a reward that computes in the caller's thread, which nothing can cancel from outside."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds beyond its time limit after which a call that could not be ended is reported."""


def too_slow(seconds: float | None) -> str:
    """Return what is wrong with a call that is given up after its time limit."""
    return f"it took longer than its time limit of {seconds:g} s (reward_timeout of a run)"


@contextmanager
def limited(name: str, seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` inside the block once it takes longer than a time limit; None is no limit.

    In the main thread, on a system with SIGALRM, the timer interrupts whatever Python does or waits for there: sleeps,
    sockets, locks, child processes. Code that does not come back to Python (a stuck kernel) cannot be interrupted, and
    neither can another thread; then an error in the log names the reward, and the call goes on.
    """
    if seconds is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_reported(name, seconds))
        if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
            stack.enter_context(_interrupted(seconds))
        yield


@contextmanager
def _reported(name: str, seconds: float) -> Iterator[None]:
    """Log an error if the block goes on beyond its time limit."""

    def report() -> None:
        logger.error(
            f"reward {name!r} is still computing, {GRACE:g} s beyond its time limit of {seconds:g} s, and cannot be "
            "interrupted: it is in native code or in another thread, or catches TimeoutError. End the run, or give "
            "the reward to isolated[...], whose calls can be given up"
        )

    timer = threading.Timer(seconds + GRACE, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after some seconds, and again as often as it is caught."""
    inside = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if inside:
            raise TimeoutError(too_slow(seconds))

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        try:
            yield
        finally:
            inside = False  # if the alarm comes before this line, what follows is done all the same
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:  # somebody else's timer
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
