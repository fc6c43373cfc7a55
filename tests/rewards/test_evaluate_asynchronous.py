"""Evaluating sets of rewards: asynchronous ones run together, and beside those that compute."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import Brightness, count_ink, latent_batch

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardError, RewardOutput
from rdm_sdk.rewards import awaiting
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import Evaluation, evaluate_reward, evaluate_rewards, start_rewards


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


class Aware(Reward):
    """Needs the run's models, and computes for a while."""

    capabilities = Capabilities(space="latent", context=True)

    def score(self, batch: RewardBatch) -> Tensor:
        time.sleep(0.3)
        return batch.latents.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_asynchronous_rewards_wait_beside_the_runs_models(chunk_size: int | None) -> None:
    """They are asked first, and answered while `dm` and its like compute; images are decoded once."""
    decoded: list[int] = []
    rewards = {"aware": Aware(), "a": as_reward(sleeping(0.3, 2.0), "a")}
    started = time.perf_counter()
    result = evaluate_rewards(rewards, latent_batch(decoded), chunk_size=chunk_size)
    assert time.perf_counter() - started < 0.5
    assert result.outputs["a"].scores.tolist() == [2.0] * 6
    assert sum(decoded) == 6


def test_chunks_wait_together() -> None:
    """A reward that waits is asked about every chunk before anybody waits for it, and keeps the samples' order."""

    async def row_of(images: Tensor, prompts: list[str], row: list[int]) -> list[float]:
        await asyncio.sleep(0.3 - 0.05 * row[0])
        return [float(value) for value in row]

    started = time.perf_counter()
    result = evaluate_reward(as_reward(row_of, "rows"), latent_batch(), chunk_size=1)
    assert time.perf_counter() - started < 0.6
    assert result.scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


class Distant(Reward):
    """Mean brightness to a power, whose gradient somebody else works out."""

    capabilities = Capabilities(asynchronous=True, gradient="awaited")

    async def score_async(self, batch: RewardBatch) -> Tensor:
        return (batch.images**2).mean(dim=(1, 2, 3))

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(await self.score_async(batch), 2 * batch.images / batch.images[0].numel())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_awaited_gradient_is_pulled_back(chunk_size: int | None) -> None:
    """It equals that of the differentiable reward, decoded once, beside a reward of the run's models."""
    decoded: list[int] = []
    rewards = {"distant": Distant(), "bright": Brightness(power=2)}
    outputs = evaluate_rewards(rewards, latent_batch(decoded), chunk_size=chunk_size).outputs
    assert sum(decoded) == 6
    for name in ("scores", "gradient"):
        torch.testing.assert_close(getattr(outputs["distant"], name), getattr(outputs["bright"], name))
    both = evaluate_rewards({"aware": Aware(), "distant": Distant()}, latent_batch(), chunk_size=chunk_size).outputs
    torch.testing.assert_close(both["distant"].gradient, outputs["distant"].gradient)
    assert evaluate_reward(Distant(), latent_batch(), gradients_of=()).gradient is None


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.zeros(6), "gradient_async.batch. must return a RewardOutput; got Tensor"),
        (RewardOutput(torch.zeros(6)), r"a gradient of shape \[6, 3, 4, 8\]; got none"),
        (RewardOutput(torch.zeros(6), torch.zeros(6, 3, 4, 4)), r"got one of shape \[6, 3, 4, 4\]"),
        (RewardOutput(torch.zeros(6), torch.full((6, 3, 4, 8), torch.nan)), "a gradient that is not finite"),
        (RewardOutput(torch.zeros(5), torch.zeros(6, 3, 4, 8)), r"one score per sample, shape \[6\]; got \[5\]"),
    ],
)
def test_an_awaited_gradient_is_checked(returned: Any, words: str) -> None:
    """Nonsense is never skipped over."""

    class Wrong(Distant):
        async def gradient_async(self, batch: RewardBatch) -> Any:
            return returned

    with pytest.raises(RewardError, match=words):
        evaluate_reward(Wrong(), latent_batch(), on_error="skip")


def test_an_awaited_gradient_is_declared_and_written() -> None:
    """It goes with asynchronous=True, and with a method that returns it."""
    with pytest.raises(RewardError, match="goes with asynchronous=True"):
        Capabilities(gradient="awaited")

    class Unwritten(Reward):
        capabilities = Capabilities(asynchronous=True, gradient="awaited")

        async def score_async(self, batch: RewardBatch) -> Tensor:
            return torch.zeros(len(batch))

    with pytest.raises(RewardError, match="Unwritten must write gradient_async"):
        Unwritten()


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_time_limit_cancels(on_error: Any) -> None:
    """A call that takes longer is cancelled, and counts as an exception of the reward."""
    cancelled: list[str] = []

    async def endless(images: Tensor, prompts: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompts[0])
            raise
        return [0.0] * len(prompts)

    rewards = {"endless": as_reward(endless, "endless"), "quick": as_reward(sleeping(0.01), "quick")}
    started = time.perf_counter()
    if on_error == "raise":
        with pytest.raises(TimeoutError, match=r"longer than its time limit of 0.1 s \(reward_timeout"):
            evaluate_rewards(rewards, latent_batch(), time_limit=0.1)
    else:
        result = evaluate_rewards(rewards, latent_batch(), on_error="skip", time_limit=0.1)
        assert list(result.outputs) == ["quick"]
        assert isinstance(result.skipped["endless"], TimeoutError)
    assert time.perf_counter() - started < 2
    assert cancelled == ["p0"]


def test_a_time_limit_names_what_cannot_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coroutine that blocks the loop is given up on, and the message says why."""
    monkeypatch.setattr(awaiting, "GRACE", 0.1)

    async def blocking(images: Tensor, prompts: list[str]) -> list[float]:
        time.sleep(0.6)
        return [0.0] * len(prompts)

    with pytest.raises(TimeoutError, match="cannot be cancelled: its coroutine computes or sleeps without awaiting"):
        evaluate_reward(as_reward(blocking, "blocking"), latent_batch(), time_limit=0.1)


def test_a_timeout_of_the_rewards_stays_its_author_s() -> None:
    """Nothing is said of a limit that did not run out."""

    async def late(images: Tensor, prompts: list[str]) -> list[float]:
        raise TimeoutError("the author's")

    with pytest.raises(TimeoutError, match=r"^the author's"):
        evaluate_reward(as_reward(late, "late"), latent_batch(), time_limit=5.0)


def test_calls_are_cancelled_when_another_reward_fails() -> None:
    """Nobody is left to wait for."""
    ended: list[str] = []

    async def endless(images: Tensor, prompts: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(prompts[0])
        return []

    def broken(images: Tensor, prompts: list[str]) -> list[float]:
        time.sleep(0.05)
        raise OSError("no route")

    with pytest.raises(OSError, match="no route"):
        evaluate_rewards({"endless": as_reward(endless, "endless"), "broken": as_reward(broken)}, latent_batch())
    until = time.monotonic() + 2
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended == ["p0"]


def test_starting_does_not_wait() -> None:
    """What computes is done when `start_rewards` returns; `collect` waits for the others."""
    began = time.perf_counter()
    started = start_rewards({"a": as_reward(sleeping(0.3), "a"), "bright": Brightness()}, latent_batch())
    assert time.perf_counter() - began < 0.25
    assert list(started.collect().outputs) == ["a", "bright"]
    assert time.perf_counter() - began >= 0.3


@pytest.mark.parametrize("only_reads", [False, True])
def test_a_reward_that_only_reads_is_given_no_copy(only_reads: bool) -> None:
    """The others are."""
    seen: list[int] = []

    async def look(images, prompts):
        seen.append(images.data_ptr())
        return [0.0] * len(prompts)

    reward, images = as_reward(look), torch.rand(2, 3, 4, 4)
    reward.only_reads = only_reads
    evaluate_reward(reward, RewardBatch.from_images(images))
    assert (seen == [images.data_ptr()]) is only_reads


def test_what_waits_takes_no_threads_from_what_computes() -> None:
    """The loop and its workers compute on one thread each; the caller keeps its number, and so do threads to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    loop = awaiting.event_loop.__wrapped__()

    async def counts() -> list[int]:
        waiting = [asyncio.to_thread(torch.get_num_threads) for _ in range(8)]
        return [torch.get_num_threads(), *await asyncio.gather(*waiting)]

    try:
        assert asyncio.run_coroutine_threadsafe(counts(), loop).result(10) == [1] * 9
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        while loop.is_running():
            time.sleep(0.01)
        loop.close()
