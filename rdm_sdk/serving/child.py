"""The process of an isolated reward: `python -m rdm_sdk.serving.child`, started by `isolated` alone.

It is told by one line of JSON on standard input, and lives until that input ends: with the host, however the host ends.
It then removes its socket's folder, because a host that was killed cannot.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time

from rdm_sdk.errors import RDMError

WATCH_SECONDS = 1.0


def main() -> int:
    """Serve one reward on a Unix domain socket; return the exit status."""
    told = json.loads(_first_line())
    folder = told.get("folder")  # made for this process; the host of another version may name none
    threading.Thread(target=_end_with_input, args=(folder,), daemon=True).start()
    threading.Thread(target=_end_with_parent, args=(folder, os.getppid()), daemon=True).start()
    try:
        from rdm_sdk.serving.server import serve
    except ImportError as error:
        print(f"an isolated reward needs {error.name} here: {sys.executable} -m pip install 'rdm-sdk[serve]'")
        return 2
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def ready(labels: list[str]) -> None:
        listening.bind(told["socket"])  # not before: the host waits for it to appear
        listening.listen(128)

    try:
        serve(told["reward"], listening, device=told["device"] or _device(), ready=ready)
    except (RDMError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    return 0


def _device() -> str | None:
    """Return this rank's GPU, None where that is left to `serve`."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank and torch.cuda.is_available() else None


def _first_line() -> bytes:
    """Return the first line of standard input, read without a buffer, whose lock would be held at the end."""
    line = b""
    while not line.endswith(b"\n") and (letter := os.read(0, 1)):
        line += letter
    return line


def _end_with_input(folder: str | None) -> None:
    """End this process when the host closes its end of standard input, as the system does when the host is killed."""
    while os.read(0, 4096):
        pass
    _end(folder)


def _end_with_parent(folder: str | None, parent: int) -> None:
    """End this process when it has another parent: a worker of the host may keep the pipe open longer."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    _end(folder)


def _end(folder: str | None) -> None:
    """Remove the folder, which the host would remove as well if it lives, and end this process at once."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
