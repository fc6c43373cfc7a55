"""Which of a run's processes keeps the others waiting, and with what: found out when they have waited long enough."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from rdm_sdk.errors import RDMError, described

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

BEAT = 0.5
"""Seconds from one sign of life of a process to the next."""
SETTLE = 3 * BEAT
"""How long a process that gives up listens to the others: all that wait as it did give up too, and those that live
give a sign."""
GRACE = 3.0
"""Seconds in which a process may end by itself after another has failed."""
_COLLECTIVE = re.compile(r"gloo|pair closure|Timed out waiting|NCCL|process group", re.IGNORECASE)
"""What errors of collective operations hold; gloo raises plain `RuntimeError`s."""
_TRAINERS = count()


@dataclass(frozen=True)
class _Sign:
    """What a process tells the others about itself."""

    beat: int
    """Counts its signs."""
    doing: str
    seconds: float
    """For how long."""
    waiting: bool
    """Whether it waits for other processes, or has given up doing so."""


class RollCall:
    """A process's place in the roll call of a run.

    Every `BEAT` seconds, what the process is doing goes to the store that it shares with the others, from a thread.
    When a collective operation fails, here or there, the message says who did not come, and why; and a process that
    goes on though another has failed is ended. The message names `limit`, the seconds that a process waits for the
    others. All of them see the store, which is None where there is but one process.
    """

    def __init__(self, index: int, count: int, limit: float, store: Store | None) -> None:
        self.index, self.count, self.limit = index, count, limit
        self.store: Any = store
        self._doing, self._since, self._waiting, self._beat = "starting", time.monotonic(), 0, 0
        self._over = threading.Event()
        self._calls = 0

    # ---- What the process does ----------------------------------------------------------------------------------

    def note(self, doing: str) -> str:
        """Take down what this process begins to do, as in "asking the rewards"; returns what it did before."""
        before, self._doing, self._since = self._doing, doing, time.monotonic()
        return before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the block count as waiting for the others."""
        self._waiting += 1
        yield
        self._waiting -= 1  # not where it fails: then this process has waited, whatever follows

    # ---- The run ------------------------------------------------------------------------------------------------

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Give signs of life during the block; a failure of it ends the others, and that of another ends it.

        Raises:
            RDMError: a collective operation has failed: who did not come, or has failed.
        """
        if self.store is None:
            yield
            return
        self._over.clear()
        self._calls, self._waiting = self._calls + 1, 0
        thread = threading.Thread(target=self._attend, name="roll call", daemon=True)
        thread.start()
        try:
            yield
        except Exception as error:
            cause = self._cause(error)
            self._end(f"process {self.index} has failed: {described(error)}" if cause is None else cause)
            if cause is None:
                raise
            raise RDMError(cause) from error
        finally:
            self._over.set()
            thread.join(GRACE)

    def _attend(self) -> None:
        """Give a sign every `BEAT`, and end the process if the run has ended elsewhere and it has not noticed."""
        # A connection of its own where PyTorch can make one: the main thread's may be waiting for an answer.
        store = getattr(self.store, "clone", lambda: self.store)()
        try:
            while not self._over.is_set():
                self._give_sign(store)
                if store.check([self._ended]):
                    reason = store.get(self._ended).decode()
                    if not self._over.wait(GRACE):
                        self._leave(reason)
                    return
                self._over.wait(BEAT)
        except RuntimeError as error:  # the process that keeps the store has left
            logger.warning(f"process {self.index} cannot tell the others what it does any more: {described(error)}")

    def _leave(self, reason: str) -> None:
        """End the process, which may hang in the middle of anything."""
        print(f"process {self.index} ends, still {self._doing}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    # ---- What the others do -------------------------------------------------------------------------------------

    @property
    def _ended(self) -> str:
        """The store's key for why this training ends, which the first process to fail sets."""
        return f"rdm/{self._calls}/ended"

    def _give_sign(self, store: Store) -> None:
        self._beat += 1
        seconds = time.monotonic() - self._since
        sign = _Sign(self._beat, self._doing, seconds, self._waiting > 0)
        store.set(f"rdm/sign/{self.index}", json.dumps(asdict(sign)))

    def _signs(self) -> dict[int, _Sign]:
        """Return the latest sign of every other process that has given one."""
        keys = {index: f"rdm/sign/{index}" for index in range(self.count) if index != self.index}
        there = {index: key for index, key in keys.items() if self.store.check([key])}
        return {index: _Sign(**json.loads(self.store.get(key))) for index, key in there.items()}

    def _end(self, reason: str) -> None:
        """Tell the others why the run ends, unless one has told before."""
        try:
            self.store.compare_set(self._ended, "", reason)
        except RuntimeError as error:
            logger.warning(f"process {self.index} cannot tell the others why it ends: {described(error)}")

    def _cause(self, error: Exception) -> str | None:
        """Return why a collective operation has failed, None for an error of another kind."""
        if not isinstance(error, RuntimeError) or not _COLLECTIVE.search(str(error)):
            return None
        self._waiting += 1
        try:
            return self._listen(error)
        except RuntimeError as gone:
            return f"the process that keeps what the others say has left ({described(gone)}): {described(error)}"

    def _listen(self, error: Exception) -> str:
        """Return what the others say after a collective operation has failed."""
        before = self._signs()
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline and not self.store.check([self._ended]):
            time.sleep(BEAT / 10)
        if self.store.check([self._ended]):
            return f"process {self.index} ends with the run: {self.store.get(self._ended).decode()}"
        return absence(before, self._signs(), [i for i in range(self.count) if i != self.index], self.limit, error)


def absence(
    before: dict[int, _Sign], after: dict[int, _Sign], others: list[int], limit: float, error: Exception
) -> str:
    """Return in words which of the `others` a process has waited for in vain, by their signs `SETTLE` apart."""
    parts, hung = [], False
    for index in others:
        sign = after.get(index)
        if sign is None or (index in before and before[index].beat == sign.beat):
            last = "it never gave one" if sign is None else f"its last was that it was {sign.doing}"
            parts.append(f"process {index} gives no sign of life ({last}); was it killed, or is it out of memory?")
        elif not sign.waiting:
            hung = True
            parts.append(f"process {index} did not come; it has been {sign.doing} for {sign.seconds:.0f} s")
    if not parts:
        return (
            f"the processes wait for each other ({described(error)}): they did not do the same things in the same "
            "order. Does a reward, a callback or the script do something on one of them alone that all take part in?"
        )
    text = f"the other processes were waited for, and {'; '.join(parts)}"
    if hung:
        text += f". They are waited for up to ddp_timeout={limit:g} seconds: set more if that is how long it takes"
    return text


def roll_call(seconds: float, cpu: bool) -> RollCall:
    """Return this process's place in the roll call of the run that it is one of, and let nobody wait longer.

    On CPUs, transformers makes the process group without that limit.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return RollCall(0, 1, seconds, None)
    if cpu:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)
    # Apart from a trainer's before, whose training may have failed. All processes make their trainers in one order.
    store = dist.distributed_c10d.PrefixStore(f"trainer {next(_TRAINERS)}", dist.distributed_c10d._get_default_store())
    return RollCall(dist.get_rank(), dist.get_world_size(), seconds, store)
