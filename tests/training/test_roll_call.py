"""Who keeps the others waiting is found out and named; here two threads are the processes, with a store in memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from rdm_sdk.errors import RDMError
from rdm_sdk.training import roll_call
from rdm_sdk.training.accelerated import processes_of
from rdm_sdk.training.roll_call import RollCall

TIMEOUT = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete"


class Store(dist.HashStore):
    """Clones of PyTorch's own are empty."""

    def clone(self) -> Store:
        return self


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> tuple[RollCall, RollCall]:
    """Return two processes that give signs every 20 ms."""
    monkeypatch.setattr(roll_call, "BEAT", 0.02)
    monkeypatch.setattr(roll_call, "SETTLE", 0.3)
    monkeypatch.setattr(roll_call, "GRACE", 0.1)
    store = Store()
    return RollCall(0, 2, 20, store), RollCall(1, 2, 20, store)


@contextmanager
def living(call: RollCall) -> Iterator[threading.Event]:
    """Let a process train in the background; it ends when the event that is given is set, or the block ends."""
    begun, done = threading.Event(), threading.Event()

    def train() -> None:
        with call.attended():
            begun.set()
            done.wait(20)

    thread = threading.Thread(target=train)
    thread.start()
    begun.wait(20)
    yield done
    done.set()
    thread.join()


def gives_up(call: RollCall, error: Exception) -> str:
    """Return what a process says that a collective operation has failed for."""
    with pytest.raises(RDMError) as caught, call.attended(), call.waiting():
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_one_that_hangs_is_named_and_ended(calls: tuple[RollCall, RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    left = threading.Event()
    monkeypatch.setattr(RollCall, "_leave", lambda self, reason: (ended.append(reason), left.set()))
    with living(calls[1]):
        calls[1].note("asking the rewards slow")
        message = gives_up(calls[0], RuntimeError(TIMEOUT))
        assert left.wait(20)
    assert "process 1 did not come; it has been asking the rewards slow for 0 s" in message
    assert "ddp_timeout=20 seconds: set more" in message
    assert ended == [message]


def test_one_that_ends_by_itself_is_let(calls: tuple[RollCall, RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "GRACE", 20.0)
    monkeypatch.setattr(RollCall, "_leave", lambda *_: pytest.fail("it was ended"))
    with living(calls[1]) as done:
        gives_up(calls[0], RuntimeError(TIMEOUT))
        done.set()


def test_one_that_waits_too_is_not_to_blame(calls: tuple[RollCall, RollCall]) -> None:
    """Both wait, so they did different things."""
    with living(calls[1]) as done, calls[1].waiting():
        message = gives_up(calls[0], RuntimeError(TIMEOUT))
        done.set()
    assert message.startswith("the processes wait for each other (RuntimeError: ")


@pytest.mark.parametrize("signs", [True, False])
def test_one_that_was_killed_is_named(calls: tuple[RollCall, RollCall], signs: bool) -> None:
    if signs:
        calls[1].note("training")
        calls[1]._give_sign(calls[1].store)
    message = gives_up(calls[0], RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    last = "its last was that it was training" if signs else "it never gave one"
    assert f"process 1 gives no sign of life ({last}); was it killed" in message


def test_the_error_of_one_is_told_by_the_others(calls: tuple[RollCall, RollCall]) -> None:
    """An error of another kind is raised as it is."""
    with pytest.raises(ValueError, match="no picture"), calls[1].attended():
        raise ValueError("no picture")
    message = gives_up(calls[0], RuntimeError("gloo: Connection closed by peer"))
    assert message.startswith("process 0 ends with the run: process 1 has failed: ValueError: no picture")


def test_a_training_after_one_that_failed(calls: tuple[RollCall, RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error that the script has caught on all processes; the earlier failure counts no more."""
    monkeypatch.setattr(RollCall, "_leave", lambda *_: pytest.fail("it was ended"))
    for call in calls:
        with pytest.raises(ValueError, match="caught"), call.attended():
            raise ValueError("caught")
    with living(calls[1]), calls[0].attended():
        threading.Event().wait(0.3)


def test_a_trainer_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script that tries several rates, and goes on with the next where one diverges."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    try:
        first, second = (roll_call.roll_call(7, cpu=False) for _ in range(2))
        first._end("it has diverged")
        assert first.store.check([first._ended])
        assert not second.store.check([second._ended])
    finally:
        dist.destroy_process_group()


def test_notes_and_waiting() -> None:
    """A note returns what it replaces; one process alone has nobody to tell."""
    call = roll_call.roll_call(20, cpu=True)
    assert (call.count, call.store) == (1, None)
    assert call.note("one") == "starting"
    assert call.note("two") == "one"
    with pytest.raises(ValueError, match="as it is"), call.attended():
        raise ValueError("as it is")


def test_nobody_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, transformers makes the process group without `ddp_timeout`, and gloo would wait for half an hour."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    try:
        call = roll_call.roll_call(7, cpu=True)
        options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    finally:
        dist.destroy_process_group()
    assert options._timeout.total_seconds() == 7
    assert (call.index, call.count, call.limit) == (0, 2, 7)


def test_the_process_of_a_run_knows_when_it_waits() -> None:
    """Through `processes_of`, whose operations are the accelerator's."""
    call = RollCall(0, 1, 20, None)
    seen: list[int] = []

    class Accelerator:
        num_processes, process_index = 2, 0

        def reduce(self, tensor: object, reduction: str) -> object:
            seen.append(call._waiting)
            return tensor

    processes = processes_of(Accelerator(), call)  # type: ignore[arg-type]
    processes.reduce("tensor", "sum")  # type: ignore[arg-type]
    processes.note("training")
    assert (seen, call._waiting, call.note("")) == ([1], 0, "training")


class Gone(Store):
    """The process that kept it has left."""

    def set(self, *_: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    check = get = compare_set = set


def test_a_store_that_is_gone_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither an error of this process nor that of a collective operation."""
    with pytest.raises(ValueError, match="no picture"), RollCall(0, 2, 20, Gone()).attended():
        raise ValueError("no picture")
    assert "process 0 cannot tell the others why it ends: DistNetworkError: Broken pipe" in caplog.text
    message = gives_up(RollCall(0, 2, 20, Gone()), RuntimeError(TIMEOUT))
    assert re.match(r"the process that keeps what the others say has left .*Timed out waiting 20000ms", message)
