"""The worker of a server: a thread that takes what waits, puts together what may be judged together, and scores it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rdm_sdk.errors import ConfigError, RewardError, described, nearest, shown
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_rewards, merged
from rdm_sdk.rewards.resolve import RewardFuncs, RunReward, WeightedReward, plan_rewards
from rdm_sdk.serving.requests import Request, RequestError, as_floats
from rdm_sdk.types import RewardOutput

FLOAT_BYTES = 2**24
"""Bytes of images that become floats at a time on a CPU."""

Answer = dict[str, RewardOutput]
"""What each reward returned, by label; gradients are on the images `[N, 3, H, W]`."""


class ScoringError(Exception):
    """A reward raised, or (`nonsense`) returned what no reward may return."""

    def __init__(self, message: str, nonsense: bool) -> None:
        super().__init__(message)
        self.nonsense = nonsense


@dataclass
class Counts:
    """What a worker has done so far."""

    batches: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)  # tensors cannot be compared
class _Job:
    request: Request
    labels: tuple[str, ...]
    gradients: bool
    future: Future[Answer] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[object, ...]:
        """What jobs must have in common to be judged together."""
        request = self.request
        columns = tuple(sorted(request.columns or ()))
        form = request.images.dtype, request.images.shape[1:]
        return self.labels, self.gradients, form, request.prompts is None, columns, request.step


class Scorer:
    """Scores requests one after the other, in a thread; those that wait are judged together where that is allowed.

    Only where each reward scores a sample by itself: groups are never mixed with the samples of another request.

    Args:
        rewards: those that are served.
        device: where their models run.
        batch_size: images judged at a time.
    """

    def __init__(self, rewards: Sequence[WeightedReward], device: torch.device | str, batch_size: int = 64) -> None:
        check_servable(rewards)
        self.rewards = {reward.label: reward for reward in rewards}
        self.device, self.batch_size = torch.device(device), batch_size
        self.counts = Counts()
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rdm-sdk scorer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests nobody has begun to score."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether what is submitted will be scored."""
        return self._thread.is_alive()

    def submit(self, request: Request, gradients: bool) -> Future[Answer]:
        """Put a request into the queue; the future raises `ScoringError` where a reward fails.

        Raises:
            RequestError: it asks what none of the rewards here can answer.
        """
        labels = tuple(self.rewards) if request.rewards is None else request.rewards
        for label in labels:
            self._check(request, label, gradients)
        job = _Job(request, labels, gradients)
        with self._changed:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Score what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: Request, label: str, gradients: bool) -> None:
        if label not in self.rewards:
            raise RequestError(
                404,
                f"there is no reward {shown(label, 80)} here.{nearest(label, self.rewards)} There are: "
                f"{', '.join(self.rewards)}",
            )
        capabilities = self.rewards[label].capabilities
        if gradients and capabilities.gradient == "none":
            raise RequestError(422, f"the reward {label!r} has no gradient; ask /v1/score")
        if capabilities.prompts and request.prompts is None:
            raise RequestError(422, f"the reward {label!r} reads prompts; send one per image")
        if capabilities.scope == "group" and request.group_size == 1:
            raise RequestError(
                422, f"the reward {label!r} compares the samples of one prompt; send group_size, at least 2"
            )
        for column in capabilities.columns:
            if column not in (request.columns or {}):
                raise RequestError(422, f"the reward {label!r} needs the column {column!r}")

    # ---- In the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._score(jobs)
            except BaseException as error:  # nothing may end the thread that everybody waits for
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(ScoringError(described(error), nonsense=False))

    def _take(self) -> list[_Job]:
        """Return the first that waits, with those that may be judged with it; none when the scorer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            first = self._waiting.popleft()
            jobs, count = [first], len(first.request)
            if all(self.rewards[label].capabilities.scope == "sample" for label in first.labels):
                for job in list(self._waiting):
                    if job.kind == first.kind and count + len(job.request) <= self.batch_size:
                        self._waiting.remove(job)
                        jobs.append(job)
                        count += len(job.request)
        return [job for job in jobs if job.future.set_running_or_notify_cancel()] or self._take()

    def _score(self, jobs: Sequence[_Job]) -> None:
        """Score jobs of one kind together; if that fails, each by itself, so that none fails for another."""
        try:
            answer = self._evaluate(jobs)
        except ScoringError as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self._score([job])
            return
        start = 0
        for job in jobs:
            rows = slice(start, start := start + len(job.request))
            job.future.set_result({label: output.part(rows) for label, output in answer.items()})

    def _evaluate(self, jobs: Sequence[_Job]) -> Answer:
        """Return what the rewards say of all jobs' images, in order."""
        first, requests = jobs[0], [job.request for job in jobs]
        images = requests[0].images if len(jobs) == 1 else torch.cat([request.images for request in requests])
        group_size = requests[0].group_size if len(jobs) == 1 else 1
        prompts = None if requests[0].prompts is None else [text for one in requests for text in one.prompts or ()]
        columns = {
            name: [value for one in requests for value in (one.columns or {})[name]]
            for name in requests[0].columns or ()
        }
        began = time.perf_counter()
        size, parts = self._at_a_time(first, images, group_size), []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            some = RewardBatch.from_images(
                as_floats(images[rows]),
                None if prompts is None else prompts[rows],
                group_size,
                {name: values[rows] for name, values in columns.items()},
                requests[0].step,
            )
            parts.append(self._judge(first, some))
        self.counts.batches += 1
        self.counts.images += len(images)
        self.counts.seconds += time.perf_counter() - began
        return parts[0] if len(parts) == 1 else {label: merged([part[label] for part in parts]) for label in parts[0]}

    def _at_a_time(self, job: _Job, images: Tensor, group_size: int) -> int:
        """Return how many images become floats at a time, in whole groups.

        On a CPU no more than lie in memory that is used again: with larger arrays, the system's first touch of new
        memory takes as long as a cheap reward. Rewards that wait for others are asked for all of them at once.
        """
        if any(self.rewards[label].capabilities.asynchronous for label in job.labels):
            return len(images)
        size = self.batch_size
        if self.device.type == "cpu":
            size = max(1, min(size, FLOAT_BYTES // (4 * images[0].numel())))
        return -(-size // group_size) * group_size

    def _judge(self, job: _Job, batch: RewardBatch) -> Answer:
        """Return what the rewards that a job asks say of a batch."""
        try:
            result = evaluate_rewards(
                {label: self.rewards[label].reward for label in job.labels},
                batch,
                chunk_size=self.batch_size,
                device=self.device,
                on_error="skip",
                gradients_of=job.labels if job.gradients else (),
                may_sit_out=job.labels,  # of these images: whoever asked may have asked about others as well
            )
        except RewardError as error:
            raise ScoringError(str(error), nonsense=True) from error
        for label, raised in result.skipped.items():
            raise ScoringError(f"the reward {label!r} raised {described(raised)}", nonsense=False) from raised
        return result.outputs


def make_scorer(rewards: RewardFuncs, device: torch.device | str, batch_size: int = 64) -> Scorer:
    """Return a scorer of rewards as `RDMTrainer` takes them; what cannot be served is refused before it is loaded.

    Raises:
        RewardError: a reward that is unknown or cannot be loaded.
        ConfigError: one that cannot judge finished images.
    """
    planned = plan_rewards(rewards)
    check_servable(planned)
    return Scorer([reward.make() for reward in planned], device, batch_size)


def check_servable(rewards: Sequence[RunReward]) -> None:
    """Raise `ConfigError` for a reward that cannot judge what is sent to a server: finished images."""
    for reward in rewards:
        if reward.capabilities.needs_models:
            raise ConfigError(f"the reward {reward.label!r} needs the models of a training run, so it cannot be served")
        if reward.capabilities.space != "pixel":
            raise ConfigError(f"the reward {reward.label!r} reads latents; a server is sent images alone")
