"""An endpoint that speaks OpenAI's API, for rewards that ask a model behind it about images."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import torch
from pydantic import Field, field_validator
from torch import Tensor

from rdm_reward_vlm.chat import Choice, NonsenseError, read_choice, read_models, read_refusal, request
from rdm_reward_vlm.pictures import png_url
from rdm_sdk import RewardError
from rdm_sdk.errors import nearest
from rdm_sdk.rewards.awaiting import event_loop
from rdm_sdk.serving.asking import Failed, PatientConfig, check_address, exchange, open_client, persist, read_secret

AGAIN = frozenset({408, 409, 425, 429})
"""Statuses that pass, beside those from 500 on."""
ANSWER_LIMIT = 2**24
"""Bytes that an answer may have."""
MODELS_NAMED = 20
"""Models that a message lists, at most."""
HINT = "Does url= end where the API's paths begin, such as http://judge:8000/v1?"

Read = TypeVar("Read")


class EndpointConfig(PatientConfig):
    """Options of a reward that asks a model behind OpenAI's API."""

    url: str
    """The endpoint's address up to /v1: "http://judge:8000/v1"."""
    model: str = Field(min_length=1)
    """The model's id there, as in its list of models."""
    key_env: str | None = None
    """The environment variable that holds the key. The key itself is in no spec, card or checkpoint."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Questions that are under way at the same time, at most; those that are tried again count as under way."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        check_address(url)
        return url


@dataclass(frozen=True)
class Question:
    """A question about an image."""

    image: Tensor
    """RGB `[3, H, W]` in [0, 1]."""
    text: str


class Endpoint:
    """Asks one model behind OpenAI's API: a bounded number of questions at a time, each again where that may help.

    Args:
        config: where, and how.
        max_tokens: how many tokens an answer may have.
        top_logprobs: of how many tokens of each place log probabilities are wanted; None is of none.
    """

    def __init__(self, config: EndpointConfig, max_tokens: int, top_logprobs: int | None = None) -> None:
        self.config, self.max_tokens, self.top_logprobs = config, max_tokens, top_logprobs
        self._key = read_secret("key_env", config.key_env)
        self._slots = asyncio.Semaphore(config.concurrency)  # of all calls: a batch may be asked about in several

    def try_out(self, text: str) -> Choice:
        """Return the answer to a question about a gray square, once the model has been found in the endpoint's list.

        Raises:
            RewardError: the endpoint cannot be reached, refuses the key or the question, serves no such model, or
                answers nonsense.
        """
        try:
            return asyncio.run_coroutine_threadsafe(self._try_out(text), event_loop()).result()
        except ConnectionError as error:
            raise RewardError(f"{error}. Is url= the endpoint's address, and does it answer from here?") from error

    async def ask(self, questions: Sequence[Question]) -> list[Choice]:
        """Return the answers to questions, in their order.

        Raises:
            RewardError: a question is refused, or an answer is nonsense.
            ServerLostError: the endpoint cannot be reached, or not in time.
        """
        tasks: list[asyncio.Task[Choice]] = []
        async with open_client(self.config.url, limits=httpx2.Limits(max_connections=None)) as client:
            try:
                async with asyncio.TaskGroup() as group:  # where one fails, the others are cancelled
                    tasks += [group.create_task(self._answer(client, question)) for question in questions]
            except ExceptionGroup as failed:
                first = failed.exceptions[0]
            else:
                return [task.result() for task in tasks]
        raise first

    async def _try_out(self, text: str) -> Choice:
        config = self.config
        async with open_client(config.url) as client:
            models = await self._request(client, "GET", "/models", None, read_models)
        if config.model not in models:
            listed = ", ".join(models[:MODELS_NAMED]) + (", ..." if len(models) > MODELS_NAMED else "")
            raise RewardError(
                f"{config.url} serves no model {config.model!r}.{nearest(config.model, models)} It serves: {listed}"
            )
        (choice,) = await self.ask([Question(torch.full((3, 224, 224), 0.5), text)])
        return choice

    async def _answer(self, client: httpx2.AsyncClient, question: Question) -> Choice:
        async with self._slots:
            # In a thread: every other asynchronous reward waits on this one's.
            image = await asyncio.to_thread(png_url, question.image)
            body = request(self.config.model, image, question.text, self.max_tokens, self.top_logprobs)
            return await self._request(client, "POST", "/chat/completions", body, read_choice)

    async def _request(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[bytearray], Read],
    ) -> Read:
        config, url = self.config, f"{self.config.url.rstrip('/')}{path}"
        headers = {"Accept-Encoding": "identity"}  # an answer unpacks to nothing
        headers |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        headers |= {} if body is None else {"Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()

        async def attempt() -> bytearray | Failed:
            reply = await exchange(
                client,
                method,
                url,
                who=url,
                timeout=config.timeout,
                limit=ANSWER_LIMIT,
                headers=headers,
                content=content,
            )
            if isinstance(reply, Failed):
                return reply
            if reply.status == 200 and reply.body is not None:
                return reply.body
            if reply.status == 200:
                raise RewardError(f"{url} answered more than {ANSWER_LIMIT} bytes, which cannot be what was asked")
            reason = f"{url} answered {reply.status}: {read_refusal(reply.body or b'')}"
            if reply.status in AGAIN or reply.status >= 500:
                return Failed(reason, reply.wait)
            raise RewardError(f"{reason}. {HINT}" if (method, reply.status) == ("GET", 404) else reason)

        answer = await persist(attempt, config, url)
        try:
            return read(answer)
        except NonsenseError as error:
            raise RewardError(f"{url} does not answer as OpenAI's API does: {error}. {HINT}") from error
