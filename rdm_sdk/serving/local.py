"""A server in this process, for tests: what `rdm-sdk serve` answers, without a second process to start and end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

from rdm_sdk.rewards.resolve import RewardFuncs
from rdm_sdk.serving.app import make_app
from rdm_sdk.serving.scorer import make_scorer

STOP_SECONDS = 10.0

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]
"""An ASGI application."""


class ThreadedServer:
    """An ASGI application behind a free port of this machine, in a thread."""

    def __init__(self, app: App) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()

    def stop(self, at_once: bool = False) -> None:
        """End it; at once, connections are cut."""
        self.server.force_exit = at_once
        self.server.should_exit = True
        self.thread.join(STOP_SECONDS)
        self.listening.close()


@contextmanager
def served(rewards: RewardFuncs, token: str | None = None, device: torch.device | str = "cpu") -> Iterator[str]:
    """Serve rewards for the duration of the block, over real HTTP; yields the address, such as "http://127.0.0.1:41234".

    Args:
        rewards: as `RDMTrainer`'s `reward_funcs`; weights mean nothing here.
        token: what clients must show; None lets everybody on this machine in.
        device: where the rewards' models run.

    Raises:
        RewardError: a reward that is unknown or cannot be loaded.
        ConfigError: one that cannot judge finished images.
    """
    scorer = make_scorer(rewards, device)
    try:
        server = ThreadedServer(make_app(scorer, token=token))
        try:
            yield server.url
        finally:
            server.stop(at_once=True)
    finally:
        scorer.close()
