"""The chat completions of OpenAI's API, as far as a judge needs them: bodies of requests, and what answers hold.

Names and meanings are those of the API's reference (POST /chat/completions, GET /models).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rdm_sdk.errors import shown


class NonsenseError(ValueError):
    """An answer that is not what the API's reference says."""


@dataclass(frozen=True)
class Choice:
    """What a model answered."""

    text: str
    """What it wrote."""
    finish: str
    """Why it stopped: "stop", "length", "content_filter", ..."""
    likeliest: list[tuple[str, float]] | None
    """The likeliest tokens of the first place with their log probabilities; none of a model that wrote nothing; None
    where the answer holds no log probabilities."""


def request(model: str, image: str, question: str, max_tokens: int, top_logprobs: int | None) -> dict[str, Any]:
    """Return the body of a request: one question about one image, which comes first, to be answered without chance.

    Args:
        model: the model's id.
        image: a link, such as a data URL.
        question: a text.
        max_tokens: how many tokens the model may write.
        top_logprobs: of how many tokens of each place log probabilities are wanted; None is of none.
    """
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
    }
    return body if top_logprobs is None else body | {"logprobs": True, "top_logprobs": top_logprobs}


def read_choice(body: bytes | bytearray) -> Choice:
    """Return the first choice of a chat completion.

    Raises:
        NonsenseError: it is none; says why.
    """
    told = _object(body)
    choices = told.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise NonsenseError(f"it holds no choices: {shown(told, 200)}")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else 0
    if not (text is None or isinstance(text, str)):
        raise NonsenseError(f"its message holds no text: {shown(choice, 200)}")
    finish = choice.get("finish_reason")
    return Choice(text or "", finish if isinstance(finish, str) else "", _likeliest(choice.get("logprobs")))


def _likeliest(logprobs: object) -> list[tuple[str, float]] | None:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        return None
    if isinstance(content, list) and not content:
        return []
    first = content[0] if isinstance(content, list) else None
    entries = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(entries, list):
        raise NonsenseError(f"its log probabilities are none: {shown(logprobs, 200)}")
    return [_entry(entry) for entry in entries]


def _entry(entry: object) -> tuple[str, float]:
    token, logarithm = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
    if not isinstance(token, str) or isinstance(logarithm, bool) or not isinstance(logarithm, int | float):
        raise NonsenseError(f"this is no token with its log probability: {shown(entry, 120)}")
    if not math.isfinite(logarithm) or logarithm > 1e-3:  # servers round
        raise NonsenseError(f"the token {token!r} has a log probability of {logarithm}; none is above 0 or infinite")
    return token, min(float(logarithm), 0.0)


def read_models(body: bytes | bytearray) -> list[str]:
    """Return the ids of the models that an endpoint serves.

    Raises:
        NonsenseError: the body is no such list.
    """
    entries = _object(body).get("data")
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not ids or not all(isinstance(name, str) for name in ids):
        raise NonsenseError(f"it is no list of models: {shown(bytes(body[:200]))}")
    return [str(name) for name in ids]


def read_refusal(body: bytes | bytearray) -> str:
    """Return what a refusal gives as its reason: the `message` of its `error`, or else how it begins."""
    try:
        told = _object(body)
    except NonsenseError:
        return shown(bytes(body[:200]))
    error = told.get("error")
    for place in (error, told):
        message = place.get("message") if isinstance(place, dict) else None
        if isinstance(message, str):
            return message[:1000]
    return error[:1000] if isinstance(error, str) else shown(told)


def _object(body: bytes | bytearray) -> dict[str, Any]:
    try:
        told = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise NonsenseError(f"it is no JSON: {shown(bytes(body[:200]))}") from error
    if not isinstance(told, dict):
        raise NonsenseError(f"it is no JSON object: {shown(told, 200)}")
    return told
