"""Calls of asynchronous rewards: under way while others compute, given up after a time, cancelled when not wanted."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.time_limit import GRACE, too_slow
from rdm_sdk.types import RewardOutput


@dataclass(eq=False)
class Call:
    """A call of an asynchronous reward that is under way from the moment that this object is made."""

    name: str
    """What messages call the reward."""
    reward: Reward
    given: RewardBatch
    """Nobody else's, because the reward runs at the same time as the others."""
    graded: bool
    """Whether the gradient is wanted, too."""
    device: torch.device
    """That of the caller."""
    time_limit: float | None = None
    """Seconds after which the call is cancelled; None is never."""

    def __post_init__(self) -> None:
        self._asked = time.monotonic()
        self._future = asyncio.run_coroutine_threadsafe(self._timed(), event_loop())

    def answer(self) -> tuple[RewardOutput, float]:
        """Wait for what the reward returns, unchecked, and the seconds that it took; or raise what it raised.

        Raises:
            TimeoutError: it took longer than the time limit.
        """
        left = None if self.time_limit is None else self.time_limit + GRACE - (time.monotonic() - self._asked)
        try:
            return self._future.result(left if left is None else max(left, 0.0))
        except TimeoutError as error:
            if self._future.done():
                raise
            raise TimeoutError(
                f"{too_slow(self.time_limit)}, and cannot be cancelled: its coroutine computes or sleeps without "
                "awaiting; use await, or asyncio.to_thread for what blocks"
            ) from error

    def cancel(self) -> None:
        """Let the answer go, if there is none yet."""
        self._future.cancel()

    async def _timed(self) -> tuple[RewardOutput, float]:
        torch.set_grad_enabled(False)  # of this thread, which does nothing else
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        started = time.perf_counter()
        limit = asyncio.timeout(self.time_limit)
        try:
            async with limit:
                ask = self.reward.gradient_async if self.graded else self.reward.score_async
                output: Any = await ask(self.given)
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(too_slow(self.time_limit)) from error
            raise
        if self.graded and not isinstance(output, RewardOutput):
            raise RewardError(
                f"reward {self.name!r}: gradient_async(batch) must return a RewardOutput; got {type(output).__name__}"
            )
        return output if isinstance(output, RewardOutput) else RewardOutput(output), time.perf_counter() - started


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of asynchronous rewards, in a separate thread for as long as the process lives.

    There is one loop for all calls, because clients and locks that a reward keeps belong to the loop they were first
    used in. It has a separate thread, because the caller's may already run a loop (in a notebook it does).

    What it and the threads of `asyncio.to_thread` compute is little, and each of them does it alone: a second team of
    OpenMP's threads would make those of the run sleep where they spin otherwise, in every parallel operation. On two
    cores that made steps 1.5 times as long.
    """
    loop, threads = asyncio.new_event_loop(), torch.get_num_threads()
    workers = min(32, (os.cpu_count() or 1) + 4)  # as many as Python makes
    started = threading.Barrier(workers + 2)

    def alone() -> None:
        torch.get_num_threads()  # a thread's first look takes everybody's number, so it must come first
        torch.set_num_threads(1)
        started.wait()

    def run() -> None:
        alone()
        loop.run_forever()

    executor = ThreadPoolExecutor(workers, "rdm-sdk rewards", alone)
    for _ in range(workers):
        executor.submit(int)  # all begin now, because none is free before all have begun
    loop.set_default_executor(executor)
    threading.Thread(target=run, name="rdm-sdk rewards", daemon=True).start()
    started.wait()
    torch.set_num_threads(threads)  # of this thread and of those to come; theirs stays
    return loop
