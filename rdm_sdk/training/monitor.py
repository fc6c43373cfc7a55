"""What a run says of itself: every figure of a step, averaged until the next log, and what the weighting goes by."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rdm_sdk.method.groups import constant_groups, group_deviation, moments
from rdm_sdk.rewards.evaluate import Evaluation
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.weighting import RewardStatistics, Weighting, state_of
from rdm_sdk.types import RewardOutput, read_all

logger = logging.getLogger(__name__)


class Monitor:
    """Collects figures by name; hands them out once as averages, and once per optimizer step as statistics."""

    def __init__(self) -> None:
        self.spent = Counter({"rollouts": 0, "critic_steps": 0, "reward_calls": 0})
        """What the run has cost beside network evaluations."""
        self._values: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._pulls: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._waiting: list[tuple[dict[str, list[tuple[float, float]]], str, Tensor | float, Tensor | float]] = []
        """Where a figure belongs, its name, its mean, and of how many: read together, once per step."""

    def forget(self) -> None:
        """Drop what a step that failed has taken down, which nobody has read."""
        self._waiting.clear()
        for notes in (self._values, self._pulls, self._scores):
            notes.clear()

    def log(self, name: str, value: Tensor | float, count: Tensor | float = 1) -> None:
        """Take a figure down, as the mean of `count` ones, which may be 0; nobody waits for tensors until it is read.

        They are scalars.
        """
        self._note(self._values, name, value, count)

    def _note(
        self, notes: dict[str, list[tuple[float, float]]], name: str, value: Tensor | float, count: Tensor | float
    ) -> None:
        self._waiting.append((notes, name, _kept(value), _kept(count)))

    def _read(self) -> None:
        """Read what has been taken down; the device is waited for once."""
        waiting, self._waiting = self._waiting, []
        pairs = [part for _, _, value, count in waiting for part in (value, count)]
        known = iter(read_all([part for part in pairs if isinstance(part, Tensor)]))
        numbers = [next(known) if isinstance(part, Tensor) else part for part in pairs]
        for (notes, name, _, _), value, count in zip(waiting, numbers[::2], numbers[1::2], strict=True):
            if count or notes is self._pulls:
                notes[name].append((value, count))

    def averages(self, processes: Processes | None = None) -> dict[str, float]:
        """Return the mean of every figure since the last call, over all processes."""
        self._read()
        sums = {name: _summed(values) for name, values in self._values.items()}
        self._values.clear()
        everyone = [sums] if processes is None else processes.gather(sums)
        names = dict.fromkeys(name for one in everyone for name in one)
        together = {name: [one[name] for one in everyone if name in one] for name in names}
        totals = {name: (sum(s for s, _ in sums), sum(n for _, n in sums)) for name, sums in together.items()}
        return {name: total / count for name, (total, count) in totals.items() if count}

    def variety(self, samples: Tensor, group_size: int) -> None:
        """Take down how different the student's samples `[N, *x]` are: those of a prompt, and all of them."""
        for name, size in (("diversity", group_size), ("deviation", len(samples))):
            if size > 1:
                self.log(f"student/{name}", group_deviation(samples, size))

    def evaluation(self, result: Evaluation, skips: bool) -> None:
        """Take down what rewards took, and which were skipped (where that is allowed)."""
        for name, seconds in result.seconds.items():
            self.log(f"rewards/{name}/seconds", seconds)
            if skips:
                self.log(f"rewards/{name}/skipped", float(name in result.skipped))
        warn_of_skipped(result)

    def reward(self, judged: WeightedReward, output: RewardOutput, group_size: int) -> None:
        """Take down what a reward said of a micro-batch; means are over the samples that it applies to."""
        scores, name = output.scores, judged.label
        self.logged(name, output.logged)
        missing = scores.isnan()
        count = (~missing).sum()
        self.log(f"rewards/{name}/nan", missing.sum())
        self.log(f"rewards/{name}/applies", (~missing).float().mean(), len(scores))
        mean, deviation = moments(scores)
        self._note(self._scores, name, mean, count)
        self.log(f"rewards/{name}/mean", mean, count)
        self.log(f"rewards/{name}/std", deviation, count)
        there = ~missing.reshape(-1, group_size).all(1)
        zero_std = mean_where(constant_groups(scores, group_size).float(), there)
        self.log(f"rewards/{name}/zero_std", zero_std, there.sum())
        # A tilt's is the teacher's distance, which is dm's figure and none of the reward's.
        if output.magnitude is not None and judged.route != "tilt":
            self.log(f"{name}/residual", mean_where(output.magnitude, ~missing), count)
        for figure, values in output.figures.items():
            self.log(f"{name}/{figure}", mean_where(values, ~missing), count)
        if judged.weight and judged.route == "advantage":
            self.log("frac_reward_zero_std", zero_std, there.sum())

    def logged(self, reward: str, figures: Mapping[str, Tensor]) -> None:
        """Take down what a reward logged itself, `[N]` each; NaN is no value."""
        for figure, values in figures.items():
            known = ~values.isnan()
            self.log(f"rewards/{reward}/{figure}", mean_where(values, known), known.sum())

    def pulls(self, pulls: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Take down the mean |normalized, unweighted gradient| of each reward, and over how many samples it is.

        A reward that applies to no sample of the micro-batch has no pull, not one of 0. One that acts by advantages has
        0 where no sample was at a step with a density, and as such it counts where none was on any process.
        """
        for name, pull in pulls.items():
            self._note(self._pulls, name, pull, counts[name])
            self.log(f"{name}/pull", pull, counts[name])

    def weighting(self, weights: Mapping[str, float], strategy: Weighting) -> None:
        """Take down the weights of an optimizer step and what they come from."""
        for name, weight in weights.items():
            self.log(f"weights/{name}", weight)
        for name, value in state_of(strategy).items():
            self.log(f"weighting/{name}", value)

    def step_statistics(
        self, names: Mapping[str, float], processes: Processes, device: torch.device
    ) -> dict[str, RewardStatistics]:
        """Return what each reward did since the last call, on the samples that it applies to, over all processes.

        Rewards that were skipped, applied to none, or were not asked, are missing.
        """
        self._read()
        rows = []
        for name in names:
            pulls, scores = self._pulls.get(name, []), self._scores.get(name, [])
            rows.append([*_summed(pulls), *_summed(scores)])
        self._pulls.clear()
        self._scores.clear()
        sums = torch.tensor(rows, dtype=torch.float64)
        if processes.count > 1:
            sums = processes.reduce(sums.to(device), "sum")
        return {
            name: RewardStatistics(pull / pulled if pulled else 0.0, score / scored)
            for name, (pull, pulled, score, scored) in zip(names, sums.tolist(), strict=True)
            if scored
        }


def warn_of_skipped(result: Evaluation) -> None:
    """Name the rewards that were skipped, and why."""
    for name, error in result.skipped.items():
        logger.warning("reward %r was skipped: %s: %s", name, type(error).__name__, error)


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of those of `values` `[N, ...]` whose row is chosen (bool `[N]`), a scalar; 0 where none is."""
    rows = chosen.reshape(-1, *[1] * (values.ndim - 1))
    count = chosen.sum() * (values.numel() // max(len(values), 1))
    return values.masked_fill(~rows, 0.0).sum() / count.clamp_min(1)


def _kept(figure: Tensor | float) -> Tensor | float:
    return figure.detach() if isinstance(figure, Tensor) else float(figure)


def _summed(means: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return sum and count of what means are of."""
    return sum(mean * count for mean, count in means), sum(count for _, count in means)
