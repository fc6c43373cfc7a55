"""A reward in a process of its own: the same scores, and no process is left behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from rdm_sdk import RewardError
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving.asking import ServerLostError
from rdm_sdk.serving.isolated import Isolated
from rdm_sdk.testing import parametrize_reward_checks

SPEC = f'isolated[python="{sys.executable}",reward=legibility]'
_MADE: list[Isolated] = []


def legibility() -> Isolated:
    """The isolated reward that the tests of this file share."""
    if not _MADE:
        _MADE.append(resolve_rewards(SPEC)[0].reward)  # type: ignore[arg-type]
    return _MADE[0]


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    """No child outlives the tests of this file."""
    yield
    while _MADE:
        _MADE.pop().child.stop()


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within a time; one that nobody has waited for has ended, too."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_it_equals_the_local_reward() -> None:
    """Bit for bit, gradient included, in another process."""
    batch = Legibility().example()
    local, distant = evaluate_reward(Legibility(), batch), evaluate_reward(legibility(), batch)
    assert torch.equal(local.scores, distant.scores)
    assert torch.equal(local.gradient, distant.gradient)  # type: ignore[arg-type]
    assert legibility().child.process.pid != os.getpid()
    assert legibility().provenance()["served"]["reward"] == "legibility"  # type: ignore[index]


def test_a_call_reads_no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a tenth of a second each time, and a private socket has no certificate."""
    loaded: list[object] = []
    monkeypatch.setattr(ssl, "create_default_context", lambda *given, **more: loaded.append(given))
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *given, **more: loaded.append(given))
    assert evaluate_reward(legibility(), Legibility().example()).scores.isfinite().any()
    assert not loaded


@parametrize_reward_checks(legibility, batch=lambda: Legibility().example())
def test_contract(check: Callable[[], None]) -> None:
    """The whole kit."""
    check()


def test_nobody_else_can_ask_it() -> None:
    """Its socket is in a folder of this user alone."""
    folder = Path(legibility().child.socket).parent
    assert folder.stat().st_mode & 0o077 == 0


def test_ctrl_c_is_for_the_run() -> None:
    """The child is in another session, so that the terminal's signal does not end it in the middle of a step."""
    assert os.getsid(legibility().child.process.pid) != os.getsid(0)


def test_it_ends_with_the_reward_and_with_its_input() -> None:
    """Two ways to end it in peace; what is asked afterwards fails, and can be skipped."""
    reward = resolve_rewards(SPEC)[0].reward
    assert isinstance(reward, Isolated)
    process, folder = reward.child.process, Path(reward.child.socket).parent
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(5) == 3
    with pytest.raises(ServerLostError, match="nobody to ask; its process ended with status 3"):
        evaluate_reward(reward, Legibility().example())
    rewards = {"isolated": reward, "local": Legibility()}
    result = evaluate_rewards(rewards, Legibility().example(), on_error="skip")
    assert list(result.outputs) == ["local"]
    assert not folder.exists()
    del reward, rewards, result
    gc.collect()  # tracebacks of the errors above hold it in circles, and the end of it finds nothing left to remove


def test_a_child_that_is_killed_in_the_middle() -> None:
    """The call that is under way ends within the set time, and says what became of the process."""
    spec = SPEC.replace("]", ",retries=1,timeout=5,max_wait=5]")
    reward = resolve_rewards(spec)[0].reward
    assert isinstance(reward, Isolated)
    reward.child.process.send_signal(signal.SIGSTOP)
    asked = time.monotonic()
    timer = subprocess.Popen([sys.executable, "-c", _KILL_LATER, str(reward.child.process.pid)])
    with pytest.raises(ServerLostError, match="its process was ended by signal 9"):
        evaluate_reward(reward, Legibility().example())
    assert time.monotonic() - asked < 5
    timer.wait(5)
    folder = Path(reward.child.socket).parent
    assert folder.is_dir()  # a process that is killed removes nothing, so the host does
    reward.child.stop()
    assert not folder.exists()


_KILL_LATER = "import os, signal, sys, time; time.sleep(0.3); os.kill(int(sys.argv[1]), signal.SIGKILL)"

_HOST = """
import os, sys, time
from rdm_sdk.rewards.resolve import resolve_rewards
reward = resolve_rewards(sys.argv[1])[0].reward
if os.fork() == 0:
    time.sleep(20)  # a worker of the host, which keeps the child's input open
    os._exit(0)
print(reward.child.process.pid, reward.child.socket, flush=True)
time.sleep(60)
"""


def test_it_is_gone_when_the_host_is_killed() -> None:
    """Even where a worker that the host has forked holds the pipe open."""
    host = subprocess.Popen([sys.executable, "-c", _HOST, SPEC], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    number, path = host.stdout.readline().split()
    pid, folder = int(number), Path(path).parent
    workers = [one for one in psutil.Process(host.pid).children() if one.pid != pid]
    assert not gone(pid, 0.1)
    assert folder.is_dir()
    host.kill()
    host.wait()
    assert gone(pid)
    assert not folder.exists()
    for worker in workers:
        worker.kill()
    host.stdout.close()


def test_what_it_prints_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a prefix; the last lines are in the message if it ends before it serves."""
    python = _program(tmp_path, "echo loading; echo 'no disk' >&2; exit 7")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RewardError, match=r"ended with status 7; its last lines: loading \| no disk"),
    ):
        Isolated(python=python, reward="legibility")
    assert "[isolated legibility] no disk" in caplog.text


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sleep 30 & wait", r"does not serve it after start_timeout=0\.3 s; it printed nothing"),
        ("kill -9 $$", "was ended by signal 9; it printed nothing"),
        (f"exec {sys.executable} -c 'import no_such_sdk'", "No module named 'no_such_sdk'"),
    ],
)
def test_a_child_that_does_not_start(tmp_path: Path, script: str, words: str) -> None:
    """Within the set time, with its last lines, and nothing is left of it."""
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(RewardError, match=words):
        Isolated(python=_program(tmp_path, script), reward="legibility", start_timeout=0.3 if "sleep" in script else 20)
    assert {child.pid for child in psutil.Process().children()} <= before


def _program(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_reward_that_is_unknown_over_there() -> None:
    """What the child says of it is in the message."""
    with pytest.raises(RewardError, match=r"ended with status 2; its last lines: .*unknown reward 'klip'"):
        Isolated(python=sys.executable, reward="klip")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"python": "no/such/python"}, "there is no program; 'rdm-sdk isolate' makes"),
        ({"python": "."}, "is a folder; name the interpreter in it"),
        ({"python": sys.executable, "reward": "dm + clip"}, "must be one reward; it is 2"),
        ({"python": sys.executable, "reward": "-jpeg"}, r"no sign and no weight; .* -1\*isolated\[...,reward=jpeg"),
        ({"python": sys.executable, "reward": "2*jpeg"}, r"no sign and no weight; .* 2\*isolated\[...,reward=jpeg"),
        ({"python": sys.executable, "reward": "clip["}, r"clip\["),
        ({"python": sys.executable, "start_timeout": 0}, "start_timeout"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(options: dict[str, object], words: str) -> None:
    """Each says what to do."""
    with pytest.raises(RewardError, match=words):
        Isolated(**({"reward": "legibility"} | options))
