"""Evaluating any set of rewards on a batch, by what they declare and nothing else.

The batch is walked through in chunks; a chunk is decoded once, judged by every reward, and its graph dropped before the
next one, so that memory does not grow with the batch and nothing touches the student's graph.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypedDict, Unpack, get_args

import torch

from rdm_sdk.errors import ConfigError, RewardError
from rdm_sdk.rewards.awaiting import Call
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.rewards.checks import (
    InapplicableError,
    checked_applies,
    checked_scores,
    is_finite_gradient,
    nothing_applies,
    rows_it_is_for,
    unchanged,
)
from rdm_sdk.rewards.judging import (
    as_declared,
    copied,
    differentiated,
    judged_with_models,
    nothing,
    of_all,
    pulled_back,
)
from rdm_sdk.rewards.logged import together
from rdm_sdk.rewards.time_limit import limited
from rdm_sdk.types import RewardOutput, read_all

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


class Options(TypedDict, total=False):
    """How rewards are evaluated; `start_rewards` has the defaults."""

    chunk_size: int | None
    device: torch.device | str | None
    offload: bool
    on_error: OnError
    gradients_of: Collection[str] | None
    may_sit_out: Collection[str]
    time_limit: float | None


def evaluate_rewards(rewards: Mapping[str, Reward], batch: RewardBatch, **options: Unpack[Options]) -> Evaluation:
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
        time_limit: seconds that a call of a reward may take, after which it counts as raising `TimeoutError`; None is
            no limit. An asynchronous reward is cancelled, one that computes here is interrupted where that can be
            done (`rewards.time_limit`). Rewards that need the run's models are not limited.

    Raises:
        RewardError: a reward returned something of the wrong type or shape, an infinite score, only NaN for what it
            was shown, or a gradient that is not finite. Nothing is repaired: a reward that returns nonsense must not
            train a model.
    """
    return start_rewards(rewards, batch, **options).collect()


def start_rewards(
    rewards: Mapping[str, Reward],
    batch: RewardBatch,
    *,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    offload: bool = False,
    on_error: OnError = "raise",
    gradients_of: Collection[str] | None = None,
    may_sit_out: Collection[str] = (),
    time_limit: float | None = None,
) -> Started:
    """Judge a batch as `evaluate_rewards` does, but for waiting: `collect()` returns the evaluation.

    Asynchronous rewards whose gradient is not wanted have been asked, and may still be at it; all others are done.

    Raises:
        RewardError, ConfigError: as `evaluate_rewards`.
    """
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error={on_error!r} cannot be used; it must be 'raise' or 'skip'")
    wanted = rewards.keys() if gradients_of is None else set(gradients_of)
    if wanted - rewards.keys():
        raise ConfigError(f"gradients_of names {min(wanted - rewards.keys())!r}, which is not among the rewards")
    graded = {name for name, reward in rewards.items() if reward.capabilities.gradient != "none"} & wanted
    where = torch.device(device) if device is not None else batch.latents.device
    capabilities = [reward.capabilities for reward in rewards.values()]
    size = samples_at_a_time(capabilities, len(batch), batch.group_size, chunk_size)
    started = Started(rewards, batch, where, on_error, graded, may_sit_out, time_limit)
    try:
        for reward in rewards.values():
            reward.to(where)
        started.compute(size)
    except BaseException:
        started.cancel()
        raise
    finally:
        if offload:
            for reward in rewards.values():
                reward.to("cpu")
    return started


def evaluate_reward(reward: Reward, batch: RewardBatch, **options: Unpack[Options]) -> RewardOutput:
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


@dataclass(frozen=True)
class _Asked:
    """What an asynchronous reward is asked of a chunk."""

    call: Call
    given: RewardBatch
    rows: Sequence[int]
    """The rows of the chunk that it is shown."""
    count: int
    """How many samples the chunk has."""
    place: int
    """Where the answer belongs among the reward's outputs."""


@dataclass(eq=False)
class Started:
    """An evaluation on its way: asynchronous rewards may be at work, the others have judged what they were given.

    The fields are the arguments of `evaluate_rewards`, settled; `graded` names the rewards whose gradient is wanted,
    each of which has one.
    """

    rewards: Mapping[str, Reward]
    batch: RewardBatch
    device: torch.device
    on_error: OnError
    graded: Collection[str]
    may_sit_out: Collection[str]
    time_limit: float | None

    def __post_init__(self) -> None:
        rewards = self.rewards
        self.whole = {n: r for n, r in rewards.items() if r.capabilities.needs_models}
        self.awaited = {n: r for n, r in rewards.items() if r.capabilities.asynchronous and n not in self.whole}
        self.plain = {n: r for n, r in rewards.items() if n not in self.whole and n not in self.awaited}
        self.outputs: dict[str, list[RewardOutput | None]] = {name: [] for name in rewards}
        """Per chunk, in order; None is still to be answered."""
        self.seconds = dict.fromkeys(rewards, 0.0)
        self.skipped: dict[str, Exception] = {}
        self.shown = dict.fromkeys(rewards, 0)
        self._asked: dict[str, deque[_Asked]] = {name: deque() for name in self.awaited}
        """What each asynchronous reward has not been heard of yet, in order."""

    def compute(self, size: int) -> None:
        """Do all but wait for asynchronous rewards whose gradient is not wanted; `size` samples at a time."""
        chunks = deque(self.batch.split(size))
        early = bool(self.awaited and self.whole)
        if early:  # so that they are at work while the run's models compute
            for chunk in chunks:
                self._ask(chunk)
        self.judge_whole(self.batch)  # before the chunks, because its networks need the memory of the decoder's graph
        for place in range(len(chunks)):  # a chunk is let go, with its graph, before the next one is judged
            self.judge_chunk(chunks.popleft(), place, asked=early)

    def judge_chunk(self, chunk: RewardBatch, place: int, asked: bool) -> None:
        """Judge one chunk by the rewards that compute, and wait for the gradients that go back through the decoder."""
        rows = self._rows(chunk, self.plain if asked else self.plain | self.awaited)
        plain = {name: reward for name, reward in self.plain.items() if rows.get(name)}
        waiting = {name: reward for name, reward in self.awaited.items() if rows.get(name)}
        # Decoded before any reward runs: once for all of them, with a graph if one needs it, and on nobody's time.
        readers = [n for n, r in (plain | waiting).items() if r.capabilities.space == "pixel"]
        if any(name in self.graded for name in readers):
            _ = chunk.tracked_images
        elif readers:
            _ = chunk.images
        self._start(waiting, chunk, rows)
        self._judge_plain(plain, chunk, rows)
        for name, _ in self._remaining(self.awaited):
            if name in self.graded and self._asked[name] and self._asked[name][0].place == place:
                self._take_answer(name, chunk)

    def _rows(self, chunk: RewardBatch, rewards: Mapping[str, Reward]) -> dict[str, list[int]]:
        """Return which rows of a chunk each reward is for; the others have no score, and no gradient."""
        rows: dict[str, list[int]] = {}
        for name, reward in self._remaining(rewards):
            with self._charged_to(name):
                rows[name] = rows_it_is_for(reward, chunk)
                self.shown[name] += len(rows[name])
                if not rows[name]:
                    self.outputs[name].append(nothing(chunk.latents, name in self.graded))
        return rows

    def collect(self) -> Evaluation:
        """Wait for the rewards that are still at it, and return what all of them returned.

        Raises:
            RewardError: as `evaluate_rewards`.
        """
        try:
            for name in self.awaited:
                while self._asked[name] and name not in self.skipped:
                    self._take_answer(name, None)
            return _finished(self)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel every call that is still under way."""
        for asked in self._asked.values():
            while asked:
                asked.popleft().call.cancel()

    def _ask(self, chunk: RewardBatch) -> None:
        """Start the asynchronous rewards on a chunk, ahead of everything else."""
        rows = self._rows(chunk, self.awaited)
        waiting = {name: reward for name, reward in self.awaited.items() if rows.get(name)}
        if any(reward.capabilities.space == "pixel" for reward in waiting.values()):
            _ = chunk.images
        self._start(waiting, chunk, rows)

    def _start(self, rewards: Mapping[str, Reward], chunk: RewardBatch, rows: Mapping[str, Sequence[int]]) -> None:
        for name, reward in rewards.items():
            given = as_declared(reward, chunk, self.device, rows[name])
            if not reward.only_reads:
                # It runs at the same time as the others, so nobody could tell who changed something in place.
                given = copied(reward, given)
            call = Call(name, reward, given, name in self.graded, self.device, self.time_limit)
            self._asked[name].append(_Asked(call, given, rows[name], len(chunk), len(self.outputs[name])))
            self.outputs[name].append(None)

    def _take_answer(self, name: str, chunk: RewardBatch | None) -> None:
        """Wait for a reward's next answer, check it and keep it; `chunk` is what a gradient is pulled back through."""
        asked = self._asked[name].popleft()
        try:
            output, seconds = asked.call.answer()
        except Exception as error:
            self.give_up(name, error)
            return
        self.seconds[name] += seconds
        reward = self.awaited[name]
        scores = checked_scores(reward, asked.given, output.scores)
        told = checked_applies(reward, scores, output.applies)
        self.shown[name] -= 0 if told is None else int((~told).sum())
        if chunk is None:
            device = self.batch.latents.device
            self.outputs[name][asked.place] = of_all(asked.given, asked.rows, asked.count, device, scores, told)
        else:
            answer = RewardOutput(scores, output.gradient, applies=told)
            self.outputs[name][asked.place] = pulled_back(reward, asked.given, chunk, asked.rows, answer)

    def judge_whole(self, batch: RewardBatch) -> None:
        """Judge the batch by the rewards that see the run's models."""
        for name, reward in self.whole.items():
            self.shown[name] = len(batch)
            with self._charged_to(name):
                self.outputs[name].append(judged_with_models(reward, batch, name in self.graded))

    def _judge_plain(
        self, rewards: Mapping[str, Reward], chunk: RewardBatch, rows: Mapping[str, Sequence[int]]
    ) -> None:
        for name, reward in rewards.items():
            with self._charged_to(name), limited(name, self.time_limit):
                if name in self.graded:
                    output = differentiated(reward, chunk, self.device, rows[name])
                else:
                    given = as_declared(reward, chunk, self.device, rows[name])
                    with torch.no_grad(), unchanged(reward, given):
                        scores = reward.score(given)
                    checked = checked_scores(reward, given, scores)
                    output = of_all(given, rows[name], len(chunk), chunk.latents.device, checked)
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


def _finished(run: Started) -> Evaluation:
    """Put the chunks together, and check what only the whole shows."""
    rewards, batch = run.rewards, run.batch
    outputs = {
        name: merged([output for output in run.outputs[name] if output is not None])
        for name in rewards
        if name not in run.skipped
    }
    absent = [output.scores.isnan().all() for output in outputs.values()]
    finite = [is_finite_gradient(rewards[name], batch, output) for name, output in outputs.items()]
    flags = read_all([*absent, *finite])
    for name, is_absent, is_finite in zip(outputs, flags, flags[len(outputs) :], strict=False):
        sits_out = (name in run.may_sit_out or rewards[name].may_sit_out) and not rewards[name].capabilities.trains
        if run.shown[name] and not sits_out and is_absent:
            run.give_up(name, nothing_applies(rewards[name], batch))
        elif not is_finite:
            raise RewardError(f"reward {rewards[name].name!r} returned a gradient that is not finite")
    kept = [name for name in rewards if name not in run.skipped]
    return Evaluation(
        {name: outputs[name] for name in kept},
        run.seconds,
        {name: rewards[name].provenance() for name in kept},
        run.skipped,
        run.shown,
    )


def merged(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Return the outputs of a reward for the chunks of a batch as one."""
    if len(outputs) == 1:
        return outputs[0]
    gradients = [output.gradient for output in outputs if output.gradient is not None]
    logged = together([output.logged for output in outputs], [len(output.scores) for output in outputs])
    scores = torch.cat([output.scores for output in outputs])
    told = [output.applies for output in outputs if output.applies is not None]
    applies = torch.cat(told) if len(told) == len(outputs) else None
    return RewardOutput(scores, torch.cat(gradients) if gradients else None, logged=logged, applies=applies)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
