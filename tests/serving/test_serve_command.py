"""`rdm-sdk serve` as a user starts and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import torch

from rdm_sdk import RewardBatch, RewardError
from rdm_sdk.cli import serve
from rdm_sdk.errors import ConfigError
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.serving.remote import Remote


@pytest.fixture
def started() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of two rewards with a token from the environment, and its address."""
    command = [sys.executable, "-m", "rdm_sdk.cli.main", "serve", "legibility + jpeg", "--port", "0"]
    environment = os.environ | {"RDM_SERVE_TOKEN": "hush"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving legibility, jpeg at http://127.0.0.1:"), line
    yield process, line.split()[4]
    process.kill()
    process.communicate()


def test_it_serves_until_it_is_told_to_stop(
    started: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token alone; what is being answered when SIGTERM comes is answered; nothing is printed, status 0."""
    process, url = started
    monkeypatch.setenv("JUDGE_TOKEN", "hush")
    with pytest.raises(RewardError, match="401"):
        Remote(url=url, reward="jpeg")
    reward = Remote(url=url, reward="jpeg", token_env="JUDGE_TOKEN", retries=0)
    batch = RewardBatch.from_images(torch.rand(64, 3, 256, 256))
    assert (evaluate_reward(reward, batch).scores < 0).all()

    def stop_while_it_works() -> None:
        headers = {"Authorization": "Bearer hush"}
        while "rdm_requests_inside 1" not in httpx2.get(f"{url}/metrics", headers=headers).text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)

    stopper = threading.Thread(target=stop_while_it_works)
    stopper.start()
    assert (evaluate_reward(reward, batch).scores < 0).all()
    began = time.monotonic()
    stopper.join(5)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")
    assert time.monotonic() - began < 5


def test_it_hears_a_signal_the_moment_it_is_ready() -> None:
    """Whoever is told that it serves may stop it at once."""
    code = (
        "import signal, socket\nfrom rdm_sdk.serving.server import serve\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        "serve('jpeg', listening, ready=lambda labels: signal.raise_signal(signal.SIGTERM))\nprint('ended')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_ctrl_c_is_no_error(started: tuple[subprocess.Popen[str], str]) -> None:
    """It is how a server in a terminal is stopped."""
    process, _ = started
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which extra brings it."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"serving rewards needs fastapi: pip install 'rdm-sdk\[serve\]'"):
        serve.run(["legibility", "--port", "0"])


def test_a_port_that_is_taken() -> None:
    """One line that names it."""
    with serve._listening("127.0.0.1", 0) as listening:
        port = str(listening.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {port}"):
            serve.run(["legibility", "--port", port])
