"""Running a server until a signal, or whoever started it, ends it; what is being answered is answered first."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import uvicorn

from rdm_sdk.rewards.resolve import RewardFuncs
from rdm_sdk.serving.app import make_app
from rdm_sdk.serving.requests import Limits
from rdm_sdk.serving.scorer import make_scorer

GRACEFUL_SECONDS = 30


class Server(uvicorn.Server):
    """Ends as it should on SIGTERM and SIGINT, which then end nothing else."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    rewards: RewardFuncs,
    listening: socket.socket,
    *,
    token: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    limits: Limits | None = None,
    ready: Callable[[list[str]], None] = lambda labels: None,
) -> None:
    """Serve rewards on a socket until SIGTERM or SIGINT; called in the main thread.

    Args:
        rewards: as `RDMTrainer`'s `reward_funcs`; weights mean nothing here.
        listening: bound, and listening or not.
        token: what clients must show; None lets everybody in.
        device: where the rewards' models run; None is the GPU if there is one.
        batch_size: images judged at a time, also those of several requests.
        limits: of a request.
        ready: is told the labels of the rewards when they are loaded.

    Raises:
        RewardError: a reward that is unknown or cannot be loaded.
        ConfigError: one that cannot judge finished images.
    """
    scorer = make_scorer(rewards, device or ("cuda" if torch.cuda.is_available() else "cpu"), batch_size)
    config = uvicorn.Config(
        make_app(scorer, limits, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        lifespan="off",
    )
    server = Server(config)
    try:
        with server.capture_signals():  # before anyone is told, so that whoever then stops it is heard
            ready(list(scorer.rewards))
            server.run(sockets=[listening])
    finally:
        scorer.close()
