"""`remote`: a reward that a server scores, anywhere; like any other to whoever uses it."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.serving.asking import PatientConfig, check_address, read_secret
from rdm_sdk.serving.client import Client, Described
from rdm_sdk.types import RewardOutput

Transport = Literal["float32", "float16", "uint8"]


class ServedConfig(PatientConfig):
    """How a server is asked."""

    transport: Transport = "float32"
    """What images travel as, and gradients with them: float32 is exact, float16 half as long, uint8 a quarter."""


@torch.no_grad()
def as_sent(images: Tensor, transport: Transport) -> Tensor:
    """Return images `[N, 3, H, W]` in [0, 1] in the dtype that travels; uint8 is from 0 to 255, rounded."""
    if transport != "uint8":
        return images.to(getattr(torch, transport))
    sent = torch.empty_like(images, dtype=torch.uint8)
    for image, place in zip(images, sent, strict=True):  # what lies between is short then, and stays in fast memory
        place.copy_((image * 255).round_().clamp_(0, 255))
    return sent


class ServedReward(Reward):
    """A reward whose scores, and gradients if it has any, come from a server.

    Subclasses call `connect` when they are made.
    """

    capabilities = Capabilities(asynchronous=True, gradient="awaited", parameters=0)
    settled_when_made = True
    only_reads = True

    class Config(ServedConfig):
        pass

    config: ServedConfig
    client: Client
    described: Described

    def connect(self, client: Client, reward: str | None) -> None:
        """Take over what a server says of a reward: what it can do, what it needs, what it is.

        Raises:
            RewardError: there is no such server or reward.
        """
        try:
            self.described = client.describe(reward)
        except ConnectionError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        self.client, self.capabilities = client, self.described.capabilities
        self.preprocessing = str(self.described.provenance.get("preprocessing", "unknown"))

    async def score_async(self, batch: RewardBatch) -> RewardOutput:
        return await self._ask(batch, gradient=False)

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        return await self._ask(batch, gradient=True)

    async def _ask(self, batch: RewardBatch, gradient: bool) -> RewardOutput:
        # In a thread: every other asynchronous reward waits on this one's.
        images = await asyncio.to_thread(as_sent, batch.images, self.config.transport)
        output = await self.client.ask(self.described, batch, images, gradient)
        for name, values in output.logged.items():
            batch.log(name, values)
        return output

    def provenance(self) -> dict[str, object]:
        return super().provenance() | {"served": dict(self.described.provenance)}


class Remote(ServedReward):
    """A reward that a server scores: `remote[url="http://judge:8000"]`, with `rdm-sdk serve clip` over there.

    It does and needs what the server's reward does and needs, gradients included. The server is asked for that when the
    reward is made, so that a wrong address, token or name is found before training.
    """

    name = "remote"

    class Config(ServedConfig):
        url: str | tuple[str, ...] | None = None
        """The server's address, or a list of equal servers, tried in turn."""
        url_env: str | None = None
        """The environment variable that holds the address where `url` is not given; several are parted by commas."""
        reward: str | None = None
        """Which of the server's rewards; not needed where it serves one."""
        token_env: str | None = None
        """The environment variable that holds the token. The token itself is in no spec, card or checkpoint."""

        @field_validator("url")
        @classmethod
        def _are_addresses(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
            if value == ():
                raise ValueError("at least one address is needed")
            for url in _listed(value):
                check_address(url)
            return value

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        urls, token = _addresses(self.name, self.config), read_secret("token_env", self.config.token_env)
        self.connect(Client(urls, self.config, token), self.config.reward)


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


def _addresses(name: str, config: Remote.Config) -> tuple[str, ...]:
    """Return the addresses of the servers, from the options or from the environment variable that they name.

    Raises:
        RewardError: there are none, or the variable holds something else.
    """
    urls = _listed(config.url)
    if urls:
        return urls
    if config.url_env is None:
        raise RewardError(
            f'reward {name!r}: where is its server? Give url="http://judge:8000", or url_env, a variable that holds it'
        )
    urls = tuple(part.strip() for part in os.environ.get(config.url_env, "").split(",") if part.strip())
    if not urls:
        raise RewardError(
            f"reward {name!r}: where is its server? Set the environment variable {config.url_env} to its address, such "
            'as http://judge:8000, or give url="http://judge:8000"'
        )
    try:
        for url in urls:
            check_address(url)
    except ValueError as error:
        raise RewardError(f"the environment variable {config.url_env}: {error}") from error
    return urls
