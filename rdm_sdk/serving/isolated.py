"""`isolated`: a reward in a process of its own, under a Python whose packages need not go with the run's."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import Field

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import RewardBatch, RewardConfig
from rdm_sdk.rewards.spec import parse_spec
from rdm_sdk.serving.asking import ServerLostError
from rdm_sdk.serving.client import Client
from rdm_sdk.serving.remote import ServedConfig, ServedReward
from rdm_sdk.types import RewardOutput

logger = logging.getLogger(__name__)

LINES_KEPT = 20
"""Last lines of the child's output, for messages."""
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RDM_SDK_PLUGINS", "RDM_SDK_DISABLE_PLUGINS")
"""Environment variables that speak of the host's packages."""
STOP_SECONDS = 2.0


class Child:
    """A server as a child process on a private socket; it ends with this object, and with this process.

    Args:
        python: the interpreter that it runs under.
        reward: the spec of one reward.
        device: where its models run; None is the GPU if there is one.

    Raises:
        RewardError: the process cannot be started.
    """

    def __init__(self, python: str, reward: str, device: str | None) -> None:
        self.python, self.reward = python, reward
        folder = tempfile.mkdtemp(prefix="rdm-")  # readable by this user alone
        self.socket = str(Path(folder) / "socket")
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        try:
            self.process = subprocess.Popen(
                [python, "-m", "rdm_sdk.serving.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,  # or the folder that the run was started in would be the first to import from
                env=environment | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for the run, which may still need the scores of this step
            )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RewardError(f"python={python!r} cannot be started: {error.strerror or error}") from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._reader = threading.Thread(
            target=_log_lines, args=(self.process.stdout, reward, self.lines), name=f"log of {reward}", daemon=True
        )
        self._reader.start()
        self.stop = weakref.finalize(self, _stop, self.process, self._reader, folder)
        """Ends the process; done at the latest when the interpreter ends."""
        told = {"reward": reward, "socket": self.socket, "folder": folder, "device": device}
        with suppress(BrokenPipeError):  # where it has ended already, `wait_until_ready` reports its last lines
            self.process.stdin.write(json.dumps(told).encode() + b"\n")
            self.process.stdin.flush()

    def wait_until_ready(self, seconds: float) -> None:
        """Return when the reward is loaded and served.

        Raises:
            RewardError: the process ended before that, or it took longer than `seconds`.
        """
        until = time.monotonic() + seconds
        while not Path(self.socket).exists():
            if self.process.poll() is not None or time.monotonic() > until:
                late = self.process.poll() is None
                state = f"does not serve it after start_timeout={seconds:g} s" if late else self.state()
                self.stop()
                raise RewardError(f"isolated reward {self.reward!r}: {self.python} {state}{self._last_lines()}")
            time.sleep(0.02)

    def state(self) -> str:
        """Return how the process ended, an empty text where it did not."""
        status = self.process.poll()
        if status is None:
            return ""
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def trouble(self) -> str:
        """Return what a message about a failed call should add."""
        state = self.state()
        return f"; its process {state}{self._last_lines()}" if state else ""

    def _last_lines(self) -> str:
        if self.state():
            self._reader.join(1.0)  # what it printed last may still be in the pipe
        lines = list(self.lines)
        return f"; its last lines: {' | '.join(lines)}" if lines else "; it printed nothing"


def _log_lines(output: IO[bytes], reward: str, lines: deque[str]) -> None:
    """Log what a child prints, until it ends."""
    for raw in output:
        line = raw.decode(errors="replace").rstrip()
        if line:
            lines.append(line[:500])
            logger.warning(f"[isolated {reward}] {line}")


def _stop(process: subprocess.Popen[bytes], reader: threading.Thread, folder: str) -> None:
    """End a child: the end of its input asks it to go, and it is killed if it does not."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session, and so what it has started itself
        process.wait()
    reader.join(1.0)
    if process.stdout is not None and not reader.is_alive():
        process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


class Isolated(ServedReward):
    """A reward in a child process under another Python: `isolated[python="envs/judge/bin/python",reward=clip]`.

    Its packages need not go with the run's; `rdm-sdk isolate` makes such an environment. The process starts when the
    reward is made and ends with it, also when the run is killed. What it prints is in the run's log.
    """

    name = "isolated"

    class Config(ServedConfig):
        python: str
        """The interpreter of the other environment: the path of its bin/python."""
        reward: str
        """The spec of one reward, as it is called there; in double quotes if it has options."""
        device: str | None = None
        """Where its models run; null is the GPU if there is one."""
        start_timeout: float = Field(default=300.0, gt=0)
        """Seconds that loading it may take."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        terms = parse_spec(self.config.reward)
        if len(terms) != 1:
            raise RewardError(f"isolated: reward={self.config.reward!r} must be one reward; it is {len(terms)}")
        if terms[0].weight != 1:
            raise RewardError(
                f"isolated: reward={self.config.reward!r} must have no sign and no weight; they go before isolated: "
                f"{terms[0].weight:g}*isolated[...,reward={terms[0].name}]"
            )
        self.child = Child(_interpreter(self.config.python), terms[0].reference, self.config.device)
        self.child.wait_until_ready(self.config.start_timeout)
        uds, trouble = self.child.socket, self.child.trouble
        self.connect(Client(["http://isolated"], self.config, uds=uds, trouble=trouble), None)

    async def _ask(self, batch: RewardBatch, gradient: bool) -> RewardOutput:
        if self.child.state():
            raise ServerLostError(f"there is nobody to ask{self.child.trouble()}")
        return await super()._ask(batch, gradient)


def _interpreter(python: str) -> str:
    """Return the path of an interpreter, absolute; links are kept, because a virtual environment's is one."""
    path = Path(python).expanduser()
    if path.is_dir():
        raise RewardError(f"python={python!r} is a folder; name the interpreter in it, such as {path / 'bin/python'}")
    if not path.is_file() or not os.access(path, os.X_OK):
        raise RewardError(f"python={python!r}: there is no program; 'rdm-sdk isolate' makes an environment with one")
    return str(path.absolute())
