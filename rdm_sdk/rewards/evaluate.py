"""Evaluating any set of rewards on a batch, by what they declare and nothing else.

The batch is walked through in chunks; a chunk is decoded once, judged by every reward, and its graph dropped before the
next one, so that memory does not grow with the batch and nothing touches the student's graph.
"""

from __future__ import annotations

import asyncio
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
from rdm_sdk.rewards.checks import (
    InapplicableError,
    check_gradient,
    checked_scores,
    nothing_applies,
    rows_it_is_for,
    unchanged,
)
from rdm_sdk.types import RewardOutput

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Evaluation:
    """The scores and gradients of a batch by a set of rewards."""

    outputs: dict[str, RewardOutput]
    """By the names that the rewards were given; a reward that was skipped is missing, one that is for none of the
    samples has NaN for all."""
    seconds: dict[str, float]
    """Time per reward; asynchronous ones wait at the same time, and decoding is counted to none."""
    provenance: dict[str, dict[str, object]]
    """Per reward, what its scores must be stored with to be comparable."""
    skipped: dict[str, Exception] = field(default_factory=dict)
    """Rewards that raised, under `on_error="skip"`."""
    shown: dict[str, int] = field(default_factory=dict)
    """How many samples each reward was asked about: those that it is for (`Reward.applies`)."""


def evaluate_rewards(
    rewards: Mapping[str, Reward],
    batch: RewardBatch,
    *,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    offload: bool = False,
    on_error: OnError = "raise",
    gradients_of: Collection[str] | None = None,
    may_sit_out: Collection[str] = (),
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
        may_sit_out: the names of the rewards that are taken at their word if they return NaN for all they were shown.

    Raises:
        RewardError: a reward returned something of the wrong type or shape, an infinite score, only NaN for what it
            was shown, or a gradient that is not finite. Nothing is repaired: a reward that returns nonsense must not
            train a model.
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
    return _finished(run, rewards, batch, may_sit_out)


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
        self.shown = dict.fromkeys(rewards, 0)

    def judge_chunk(self, chunk: RewardBatch) -> None:
        """Judge one chunk; the asynchronous rewards wait in a thread while the others compute."""
        rows: dict[str, list[int]] = {}
        for name, reward in self._remaining(self.plain | self.awaited):
            with self._charged_to(name):
                rows[name] = rows_it_is_for(reward, chunk)
                self.shown[name] += len(rows[name])
                if not rows[name]:
                    self.outputs[name].append(_inapplicable(chunk, name in self.graded))
        plain = {name: reward for name, reward in self.plain.items() if rows.get(name)}
        waiting = {name: reward for name, reward in self.awaited.items() if rows.get(name)}
        # Decoded before any reward runs: once for all of them, with a graph if one needs it, and on nobody's time.
        readers = [n for n, r in (plain | waiting).items() if r.capabilities.space == "pixel"]
        if any(name in self.graded for name in readers):
            _ = chunk.tracked_images
        elif readers:
            _ = chunk.images
        if not waiting:
            self._judge_plain(plain, chunk, rows)
            return
        # Copies: these rewards run at the same time as the others, so nobody could tell who changed something in place.
        given = {n: _copied(r, as_declared(r, chunk, self.device, rows[n])) for n, r in waiting.items()}
        future = asyncio.run_coroutine_threadsafe(_await_all(waiting, given, self.device), _event_loop())
        try:
            self._judge_plain(plain, chunk, rows)
        finally:
            results = future.result()
        for name, result in results.items():
            if isinstance(result, BaseException):
                self.give_up(name, result)
            else:
                scores, seconds = result
                self.seconds[name] += seconds
                scores = checked_scores(self.awaited[name], given[name], scores)
                self.outputs[name].append(RewardOutput(_spread(scores, rows[name], chunk, torch.nan)))

    def judge_whole(self, batch: RewardBatch) -> None:
        """Judge the batch by the rewards that see the run's models."""
        for name, reward in self.whole.items():
            self.shown[name] = len(batch)
            with self._charged_to(name):
                self.outputs[name].append(_judged_with_models(reward, batch, name in self.graded))

    def _judge_plain(
        self, rewards: Mapping[str, Reward], chunk: RewardBatch, rows: Mapping[str, Sequence[int]]
    ) -> None:
        for name, reward in rewards.items():
            with self._charged_to(name):
                if name in self.graded:
                    output = _differentiated(reward, chunk, self.device, rows[name])
                else:
                    given = as_declared(reward, chunk, self.device, rows[name])
                    with torch.no_grad(), unchanged(reward, given):
                        scores = reward.score(given)
                    checked = checked_scores(reward, given, scores)
                    output = RewardOutput(_spread(checked, rows[name], chunk, torch.nan))
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


def as_declared(
    reward: Reward, chunk: RewardBatch, device: torch.device, rows: Sequence[int] | None = None
) -> RewardBatch:
    """Return the chunk as the reward wants it: its dtype, on its device, without a graph, with copies of all lists.

    `rows` are those that it is shown, in order; None is all.
    """
    dtype = getattr(torch, reward.capabilities.dtype)
    pixels = reward.capabilities.space == "pixel"
    if rows is not None and len(rows) < len(chunk):
        chunk = chunk.select(rows)
    columns = {name: list(values) for name, values in chunk.columns.items()}
    images = chunk.images if pixels else None
    chunk = replace(chunk, prompts=list(chunk.prompts), columns=columns, context=None)
    if images is not None:
        return chunk.with_images(images.detach().to(device, dtype))
    return chunk.with_latents(chunk.latents.detach().to(device, dtype))


def _inapplicable(chunk: RewardBatch, graded: bool) -> RewardOutput:
    """Return the output of a reward that is for none of the chunk's samples."""
    scores = torch.full((len(chunk),), torch.nan, device=chunk.latents.device)
    return RewardOutput(scores, torch.zeros_like(chunk.latents) if graded else None)


def _spread(values: Tensor, rows: Sequence[int], chunk: RewardBatch, fill: float) -> Tensor:
    """Return values `[n, ...]` of some rows as those of the whole chunk, `[N, ...]` in float32, on its device."""
    values = values.to(chunk.latents.device, torch.float32)
    if len(rows) == len(chunk):
        return values
    whole = torch.full((len(chunk), *values.shape[1:]), fill, device=values.device)
    whole[list(rows)] = values
    return whole


def _differentiated(reward: Reward, chunk: RewardBatch, device: torch.device, rows: Sequence[int]) -> RewardOutput:
    """Return the scores of a chunk with their gradient with respect to its latents, for `gradient="autograd"`."""
    judged = as_declared(reward, chunk, device, rows)
    pixels = reward.capabilities.space == "pixel"
    leaf = (judged.images if pixels else judged.latents).requires_grad_()
    with torch.enable_grad():
        scores = reward.score(judged)
    checked = checked_scores(reward, judged, scores)
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
    checked, gradient = _spread(checked, rows, chunk, torch.nan), _spread(gradient, rows, chunk, 0.0)
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
    return RewardOutput(checked_scores(reward, batch, output.scores), output.gradient, magnitude)


def _finished(run: _Run, rewards: Mapping[str, Reward], batch: RewardBatch, may_sit_out: Collection[str]) -> Evaluation:
    """Put the chunks together, and check what only the whole shows."""
    outputs = {}
    for name, reward in rewards.items():
        if name not in run.skipped:
            outputs[name] = _merged(run.outputs[name])
            sits_out = name in may_sit_out and not reward.capabilities.trains
            if run.shown[name] and not sits_out and outputs[name].scores.isnan().all():
                run.give_up(name, nothing_applies(reward, batch))
            else:
                check_gradient(reward, batch, outputs[name].gradient)
    kept = [name for name in rewards if name not in run.skipped]
    return Evaluation(
        {name: outputs[name] for name in kept},
        run.seconds,
        {name: rewards[name].provenance() for name in kept},
        run.skipped,
        run.shown,
    )


def _merged(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Put a reward's chunks together."""
    if len(outputs) == 1:
        return outputs[0]
    gradients = [output.gradient for output in outputs if output.gradient is not None]
    return RewardOutput(torch.cat([output.scores for output in outputs]), torch.cat(gradients) if gradients else None)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
