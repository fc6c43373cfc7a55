"""Evaluating any set of rewards on a batch, by what they declare and nothing else.

The batch is walked through in chunks; a chunk is decoded once, judged by every reward, and its graph dropped before the
next one, so that memory does not grow with the batch and nothing touches the student's graph.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError, RewardError
from rdm_sdk.method.noise import per_sample
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.types import RewardOutput

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Evaluation:
    """The scores and gradients of a batch by a set of rewards."""

    outputs: dict[str, RewardOutput]
    """By the names that the rewards were given; a reward that was skipped is missing."""
    seconds: dict[str, float]
    """Time per reward; asynchronous ones wait at the same time, and decoding is counted to none."""
    provenance: dict[str, dict[str, object]]
    """Per reward, what its scores must be stored with to be comparable."""
    skipped: dict[str, Exception] = field(default_factory=dict)
    """Rewards that raised, under `on_error="skip"`."""


def evaluate_rewards(
    rewards: Mapping[str, Reward],
    batch: RewardBatch,
    *,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    offload: bool = False,
    on_error: OnError = "raise",
    gradients_of: Collection[str] | None = None,
) -> Evaluation:
    """Return every reward's scores `[N]` and, where it has one, its gradient with respect to the latents `[N, *x]`.

    Args:
        rewards: name to reward.
        batch: the samples, group-major.
        chunk_size: samples judged at a time, rounded up to whole groups if a reward compares within groups; None is
            all at once. Rewards that need the run's models always see the whole batch. The result does not depend on
            it.
        device: where the rewards' models run; None is where the latents are.
        offload: move the rewards' models back to the CPU afterwards.
        on_error: what an exception inside a reward does: "raise", or "skip", which leaves the reward out of the
            outputs, as it does for a reward that applies to none of the batch. What a reward returns is checked in
            either case: nonsense is never skipped over.
        gradients_of: the names of the rewards whose gradient is wanted; None is all that have one, () is none.

    Raises:
        RewardError: a reward returned something of the wrong type or shape, an infinite score, only NaN, or a gradient
            that is not finite. Nothing is repaired: a reward that returns nonsense must not train a model.
    """
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error={on_error!r} cannot be used; it must be 'raise' or 'skip'")
    wanted = rewards.keys() if gradients_of is None else set(gradients_of)
    if wanted - rewards.keys():
        raise ConfigError(f"gradients_of names {min(wanted - rewards.keys())!r}, which is not among the rewards")
    run = _Run(
        rewards,
        torch.device(device) if device is not None else batch.latents.device,
        on_error,
        {name for name, reward in rewards.items() if reward.capabilities.gradient != "none"} & wanted,
    )
    capabilities = [reward.capabilities for reward in rewards.values()]
    size = samples_at_a_time(capabilities, len(batch), batch.group_size, chunk_size)
    try:
        for reward in rewards.values():
            reward.to(run.device)
        run.judge_whole(batch)  # first, because its networks need the memory that the decoder's graph takes afterwards
        for chunk in batch.split(size):
            run.judge_chunk(chunk)
    finally:
        if offload:
            for reward in rewards.values():
                reward.to("cpu")
    return _finished(run, rewards, batch)


def evaluate_reward(reward: Reward, batch: RewardBatch, **options: Any) -> RewardOutput:
    """Return one reward's output, or raise what it raised; see `evaluate_rewards` for the options."""
    result = evaluate_rewards({reward.name: reward}, batch, **options)
    for error in result.skipped.values():
        raise error
    return result.outputs[reward.name]


def samples_at_a_time(rewards: Iterable[Capabilities], count: int, group_size: int, wanted: int | None) -> int:
    """Return how many of `count` samples are judged at a time: whole groups where a reward compares within them."""
    size = count if wanted is None else wanted
    if size < 1:
        raise RewardError(f"chunk_size must be at least 1 or None; got {wanted}")
    return -(-size // group_size) * group_size if any(reward.scope == "group" for reward in rewards) else size


class _Run:
    """One evaluation on its way through the chunks."""

    def __init__(
        self, rewards: Mapping[str, Reward], device: torch.device, on_error: OnError, graded: Collection[str]
    ) -> None:
        self.device, self.on_error, self.graded = device, on_error, graded
        self.whole = {n: r for n, r in rewards.items() if r.capabilities.needs_models}
        self.awaited = {n: r for n, r in rewards.items() if r.capabilities.asynchronous and n not in self.whole}
        self.plain = {n: r for n, r in rewards.items() if n not in self.whole and n not in self.awaited}
        self.outputs: dict[str, list[RewardOutput]] = {name: [] for name in rewards}
        self.seconds = dict.fromkeys(rewards, 0.0)
        self.skipped: dict[str, Exception] = {}

    def judge_chunk(self, chunk: RewardBatch) -> None:
        """Judge one chunk; the asynchronous rewards wait in a thread while the others compute."""
        # Decoded before any reward runs: once for all of them, with a graph if one needs it, and on nobody's time.
        readers = [n for n, r in (self.plain | self.awaited).items() if r.capabilities.space == "pixel"]
        if any(name in self.graded for name in readers):
            _ = chunk.tracked_images
        elif readers:
            _ = chunk.images
        if not self.awaited:
            self._judge_plain(chunk)
            return
        waiting = dict(self._remaining(self.awaited))
        # Copies: these rewards run at the same time as the others, so nobody could tell who changed something in place.
        given = {name: _copied(reward, as_declared(reward, chunk, self.device)) for name, reward in waiting.items()}
        future = asyncio.run_coroutine_threadsafe(_await_all(waiting, given, self.device), _event_loop())
        try:
            self._judge_plain(chunk)
        finally:
            results = future.result()
        for name, result in results.items():
            if isinstance(result, BaseException):
                self.give_up(name, result)
            else:
                scores, seconds = result
                self.seconds[name] += seconds
                self.outputs[name].append(RewardOutput(_checked_scores(self.awaited[name], chunk, scores)))

    def judge_whole(self, batch: RewardBatch) -> None:
        """Judge the batch by the rewards that see the run's models."""
        for name, reward in self.whole.items():
            with self._charged_to(name):
                self.outputs[name].append(_judged_with_models(reward, batch, name in self.graded))

    def _judge_plain(self, chunk: RewardBatch) -> None:
        for name, reward in self._remaining(self.plain):
            with self._charged_to(name):
                if name in self.graded:
                    output = _differentiated(reward, chunk, self.device)
                else:
                    given = as_declared(reward, chunk, self.device)
                    with torch.no_grad(), _unchanged(reward, given):
                        scores = reward.score(given)
                    output = RewardOutput(_checked_scores(reward, chunk, scores))
                self.outputs[name].append(output)

    def _remaining(self, rewards: Mapping[str, Reward]) -> list[tuple[str, Reward]]:
        return [(name, reward) for name, reward in rewards.items() if name not in self.skipped]

    @contextmanager
    def _charged_to(self, name: str) -> Iterator[None]:
        """Add the block's time to a reward's, and let its exceptions stop or skip that reward."""
        started = _now(self.device)
        try:
            yield
        except Exception as error:
            self.give_up(name, error)
        self.seconds[name] += _now(self.device) - started

    def give_up(self, name: str, error: BaseException) -> None:
        """Skip a reward where `on_error` allows it, or raise; a `RewardError` means a broken reward: always raised."""
        always = isinstance(error, RewardError) and not isinstance(error, InapplicableError)
        if self.on_error == "raise" or always or not isinstance(error, Exception):
            if not isinstance(error, RewardError):
                error.add_note(f"(raised by the reward {name!r})")
            raise error
        self.skipped[name] = error


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of asynchronous rewards, in a separate thread for as long as the process lives.

    There is one loop for all calls, because clients and locks that a reward keeps belong to the loop they were first
    used in. It has a separate thread, because the caller's may already run a loop (in a notebook it does).
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rdm-sdk rewards", daemon=True).start()
    return loop


async def _await_all(
    rewards: Mapping[str, Reward], given: Mapping[str, RewardBatch], device: torch.device
) -> dict[str, Any]:
    """Await all rewards together; each result is scores and seconds, or the exception it raised."""
    torch.set_grad_enabled(False)  # of this thread, which does nothing else
    if device.type == "cuda":
        torch.cuda.set_device(device)

    async def timed(reward: Reward, batch: RewardBatch) -> tuple[Tensor, float]:
        started = time.perf_counter()
        return await reward.score_async(batch), time.perf_counter() - started

    calls = [timed(reward, given[name]) for name, reward in rewards.items()]
    return dict(zip(rewards, await asyncio.gather(*calls, return_exceptions=True), strict=True))


def _copied(reward: Reward, given: RewardBatch) -> RewardBatch:
    """Return the batch with what the reward reads copied, so that a change in place reaches no other reward."""
    copy = given.with_latents(given.latents.clone())
    return copy.with_images(given.images.clone()) if reward.capabilities.space == "pixel" else copy


def as_declared(reward: Reward, chunk: RewardBatch, device: torch.device) -> RewardBatch:
    """Return the chunk as the reward wants it: its dtype, on its device, without a graph, with copies of all lists."""
    dtype = getattr(torch, reward.capabilities.dtype)
    columns = {name: list(values) for name, values in chunk.columns.items()}
    images = chunk.images if reward.capabilities.space == "pixel" else None
    chunk = replace(chunk, prompts=list(chunk.prompts), columns=columns, context=None)
    if images is not None:
        return chunk.with_images(images.detach().to(device, dtype))
    return chunk.with_latents(chunk.latents.detach().to(device, dtype))


@contextmanager
def _unchanged(reward: Reward, given: RewardBatch) -> Iterator[None]:
    """Raise if the block changes the images or latents in place: other rewards, and the caller, share their memory."""
    watched = given.images if reward.capabilities.space == "pixel" else given.latents
    before = watched._version
    yield
    if watched._version != before:
        raise RewardError(
            f"reward {reward.name!r} changes its {'images' if watched is not given.latents else 'latents'} in place, "
            "which other rewards share; use x * 2 instead of x.mul_(2), or clone() first"
        )


def _differentiated(reward: Reward, chunk: RewardBatch, device: torch.device) -> RewardOutput:
    """Return the scores of a chunk with their gradient with respect to its latents, for `gradient="autograd"`."""
    judged = as_declared(reward, chunk, device)
    pixels = reward.capabilities.space == "pixel"
    leaf = (judged.images if pixels else judged.latents).requires_grad_()
    with torch.enable_grad():
        scores = reward.score(judged)
    checked = _checked_scores(reward, chunk, scores)
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.nansum(), leaf, allow_unused=True)
    elif checked.isnan().all():
        gradient = torch.zeros_like(leaf)  # a chunk to which the reward does not apply
    else:
        gradient = None
    if gradient is None:
        raise RewardError(
            f"reward {reward.name!r} declares gradient='autograd', but its scores carry no gradient: remove no_grad, "
            "detach, PIL or NumPy from score(), or declare gradient='none'"
        )
    if reward.capabilities.scope == "sample":
        # A sample that the reward does not apply to has no gradient, however its NaN came about.
        gradient = gradient.masked_fill(per_sample(scores.isnan(), gradient), 0)
    gradient = gradient.to(chunk.latents.device, torch.float32)
    return RewardOutput(checked, chunk.pull_back(gradient).float() if pixels else gradient)


def _judged_with_models(reward: Reward, batch: RewardBatch, differentiate: bool) -> RewardOutput:
    """Return the field, or the scores alone, of a reward that needs the run's models."""
    output = reward.field(batch) if differentiate else RewardOutput(reward.score(batch))
    if not isinstance(output, RewardOutput):
        raise RewardError(
            f"reward {reward.name!r}: field(batch) must return a RewardOutput; got {type(output).__name__}"
        )
    if differentiate and output.gradient is None:
        raise RewardError(
            f"reward {reward.name!r} declares gradient='field', and its field(batch) returned no gradient; return "
            "RewardOutput(scores, gradient)"
        )
    magnitude = output.magnitude
    if magnitude is not None and magnitude.shape != (len(batch),):
        raise RewardError(
            f"reward {reward.name!r} must return one magnitude per sample, shape [{len(batch)}], or None; got "
            f"{list(magnitude.shape)}"
        )
    return RewardOutput(_checked_scores(reward, batch, output.scores), output.gradient, magnitude)


def _finished(run: _Run, rewards: Mapping[str, Reward], batch: RewardBatch) -> Evaluation:
    """Put the chunks together, and check what only the whole shows."""
    outputs = {}
    for name, reward in rewards.items():
        if name not in run.skipped:
            outputs[name] = _merged(run.outputs[name])
            if outputs[name].scores.isnan().all():
                run.give_up(name, _nothing_applies(reward, batch))
            else:
                _check_gradient(reward, batch, outputs[name].gradient)
    kept = [name for name in rewards if name not in run.skipped]
    return Evaluation(
        {name: outputs[name] for name in kept},
        run.seconds,
        {name: rewards[name].provenance() for name in kept},
        run.skipped,
    )


def _merged(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Put a reward's chunks together."""
    if len(outputs) == 1:
        return outputs[0]
    gradients = [output.gradient for output in outputs if output.gradient is not None]
    return RewardOutput(torch.cat([output.scores for output in outputs]), torch.cat(gradients) if gradients else None)


def _check_gradient(reward: Reward, batch: RewardBatch, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if gradient.shape != batch.latents.shape:
        raise RewardError(
            f"reward {reward.name!r} must return a gradient of the latents' shape {list(batch.latents.shape)}; "
            f"got {list(gradient.shape)}"
        )
    if not bool(gradient.isfinite().all()):
        raise RewardError(f"reward {reward.name!r} returned a gradient that is not finite")


class InapplicableError(RewardError):
    """A reward that applies to none of a batch's samples; under `on_error="skip"` it sits this batch out."""


def _nothing_applies(reward: Reward, batch: RewardBatch) -> RewardError:
    if reward.capabilities.trains:
        return RewardError(
            f"reward {reward.name!r} is NaN for every sample: its {reward.capabilities.trains!r} role or the student "
            "has diverged; lower critic_learning_rate or learning_rate"
        )
    return InapplicableError(
        f"reward {reward.name!r} returned NaN (not applicable) for every sample; first prompt: {batch.prompts[0]!r}. "
        "If it applies to some prompts only, put more prompts into a batch, or let it sit batches out: "
        "reward_on_error='skip' in a run, on_error='skip' elsewhere"
    )


def _checked_scores(reward: Reward, batch: RewardBatch, scores: object) -> Tensor:
    """Return scores as float32 `[N]` on the latents' device, after checking type, shape and that none is infinite."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        if inspect.iscoroutine(scores):
            scores.close()
            got += "; an asynchronous reward declares Capabilities(asynchronous=True) and writes score_async"
        raise RewardError(f"reward {reward.name!r} must return a floating-point tensor of scores; got {got}")
    if scores.shape != (len(batch),):
        raise RewardError(
            f"reward {reward.name!r} must return one score per sample, shape [{len(batch)}]; got {list(scores.shape)}"
        )
    scores = scores.detach().to(batch.latents.device, torch.float32)
    if scores.isinf().any():
        shown = ", ".join(f"{value:.4g}" for value in scores[:8].tolist()) + (", ..." if len(scores) > 8 else "")
        raise RewardError(f"reward {reward.name!r} returned an infinite score: {shown}")
    return scores


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
