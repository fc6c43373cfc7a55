"""Evaluating sets of rewards: asynchronous ones run together, and beside those that compute."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from toy_rewards import Brightness, count_ink, latent_batch

from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import Evaluation, evaluate_reward, evaluate_rewards


def sleeping(seconds: float, value: float = 1.0) -> Any:
    """An asynchronous reward that waits."""

    async def wait(images, prompts, **columns):
        await asyncio.sleep(seconds)
        return [value] * len(prompts)

    return wait


def test_asynchronous_rewards_run_together() -> None:
    """Two that wait, and a synchronous one that computes, take as long as the longest."""

    def busy(images, prompts, **columns):
        time.sleep(0.3)
        return [0.0] * len(prompts)

    rewards = {"a": as_reward(sleeping(0.3, 1.0), "a"), "b": as_reward(sleeping(0.3, 2.0), "b"), "c": as_reward(busy)}
    started = time.perf_counter()
    result = evaluate_rewards(rewards, latent_batch())
    assert time.perf_counter() - started < 0.8
    assert [result.outputs[name].scores[0].item() for name in "abc"] == [1.0, 2.0, 0.0]
    assert all(result.seconds[name] >= 0.28 for name in "abc")


def test_asynchronous_rewards_inside_a_running_loop() -> None:
    """In a notebook a loop is already running."""

    async def notebook() -> Evaluation:
        return evaluate_rewards({"a": as_reward(sleeping(0.01, 3.0), "a")}, latent_batch())

    assert asyncio.run(notebook()).outputs["a"].scores.tolist() == [3.0] * 6


def test_asynchronous_rewards_keep_their_loop() -> None:
    """What they keep between calls, such as a lock that was waited for, stays usable."""
    limit = asyncio.Semaphore(1)

    async def limited(images, prompts, **columns):
        async with limit:
            await asyncio.sleep(0.01)
            return [1.0] * len(prompts)

    rewards = {name: as_reward(limited, name) for name in "ab"}
    for _ in range(2):
        assert evaluate_rewards(rewards, latent_batch(), chunk_size=2).outputs["b"].scores.tolist() == [1.0] * 6


def test_asynchronous_rewards_have_images_of_their_own() -> None:
    """What they change in place is nobody else's."""

    async def evil(images, prompts, **columns):
        images.zero_()
        return [0.0] * len(prompts)

    rewards = {"evil": as_reward(evil, "evil"), "ink": as_reward(count_ink)}
    found = evaluate_rewards(rewards, latent_batch()).outputs["ink"].scores
    assert torch.equal(found, evaluate_reward(as_reward(count_ink), latent_batch()).scores)


def test_an_object_with_an_asynchronous_call() -> None:
    """Such an object is awaited as well."""

    class Client:
        async def __call__(self, images, prompts, **columns):
            return [4.0] * len(prompts)

    assert evaluate_reward(as_reward(Client(), "client"), latent_batch()).scores.tolist() == [4.0] * 6


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_asynchronous_error(on_error: Any) -> None:
    """Errors of asynchronous rewards follow the same policy."""

    async def broken(images, prompts, **columns):
        raise TimeoutError("too slow")

    rewards = {"slow": as_reward(broken, "slow"), "bright": Brightness()}
    if on_error == "raise":
        with pytest.raises(TimeoutError, match="too slow"):
            evaluate_rewards(rewards, latent_batch())
    else:
        result = evaluate_rewards(rewards, latent_batch(), on_error="skip")
        assert list(result.outputs) == ["bright"]
        assert isinstance(result.skipped["slow"], TimeoutError)
