"""What a run says of itself: every figure of a step, averaged until the next log, and what the weighting goes by."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rdm_sdk.method.groups import group_deviation
from rdm_sdk.method.objective import zero_std_share
from rdm_sdk.rewards.evaluate import Evaluation
from rdm_sdk.rewards.resolve import WeightedReward
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.weighting import RewardStatistics, Weighting
from rdm_sdk.types import RewardOutput

logger = logging.getLogger(__name__)


class Monitor:
    """Collects figures by name; hands them out once as averages, and once per optimizer step as statistics."""

    def __init__(self) -> None:
        self.spent = Counter({"rollouts": 0, "critic_steps": 0, "reward_calls": 0})
        """What the run has cost beside network evaluations."""
        self._values: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._pulls: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._scores: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def log(self, name: str, value: Tensor | float, count: int = 1) -> None:
        """Take a figure down, as the mean of `count` ones."""
        self._values[name].append((value.detach().item() if isinstance(value, Tensor) else float(value), count))

    def averages(self, processes: Processes | None = None) -> dict[str, float]:
        """Return the mean of every figure since the last call, over all processes."""
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
        for name, error in result.skipped.items():
            logger.warning("reward %r was skipped: %s: %s", name, type(error).__name__, error)

    def reward(self, judged: WeightedReward, output: RewardOutput, group_size: int) -> None:
        """Take down what a reward said of a micro-batch; means are over the samples that it applies to."""
        scores, name = output.scores, judged.label
        missing = scores.isnan()
        self.log(f"rewards/{name}/nan", missing.sum())
        self.log(f"rewards/{name}/applies", (~missing).float().mean(), len(scores))
        valid = scores[~missing]
        if not len(valid):
            return
        mean, count = valid.mean().item(), len(valid)
        self._scores[name].append((mean, count))
        self.log(f"rewards/{name}/mean", mean, count)
        self.log(f"rewards/{name}/std", valid.std() if count > 1 else 0.0, count)
        groups = scores.reshape(-1, group_size)
        groups = groups[~groups.isnan().all(1)]
        zero_std = zero_std_share(groups.flatten(), group_size)
        self.log(f"rewards/{name}/zero_std", zero_std, len(groups))
        # A tilt's is the teacher's distance, which is dm's figure and none of the reward's.
        if output.magnitude is not None and judged.route != "tilt":
            self.log(f"{name}/residual", output.magnitude[~missing].mean(), count)
        for figure, values in output.figures.items():
            self.log(f"{name}/{figure}", values[~missing].mean(), count)
        if judged.route == "advantage":
            self.log("frac_reward_zero_std", zero_std, len(groups))

    def pulls(self, pulls: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Take down the mean |normalized, unweighted gradient| of each reward, and over how many samples it is.

        A reward that applies to no sample of the micro-batch has no pull, not one of 0. One that acts by advantages has
        0 where no sample was at a step with a density, and as such it counts where none was on any process.
        """
        for name, pull in pulls.items():
            self._pulls[name].append((pull, counts[name]))
            self.log(f"{name}/pull", pull, counts[name])

    def weighting(self, weights: Mapping[str, float], strategy: Weighting) -> None:
        """Take down the weights of an optimizer step and what they come from."""
        for name, weight in weights.items():
            self.log(f"weights/{name}", weight)
        for name, value in strategy.state_dict().items():
            self.log(f"weighting/{name}", value)

    def step_statistics(
        self, names: Mapping[str, float], processes: Processes, device: torch.device
    ) -> dict[str, RewardStatistics]:
        """Return what each reward did since the last call, on the samples that it applies to, over all processes.

        Rewards that were skipped, or applied to none, are missing.
        """
        sums = torch.zeros(len(names), 5, dtype=torch.float64, device=device)
        for row, name in enumerate(names):
            pulls, scores = self._pulls.get(name, []), self._scores.get(name, [])
            sums[row] = torch.tensor([len(pulls), *_summed(pulls), *_summed(scores)])
        self._pulls.clear()
        self._scores.clear()
        sums = processes.reduce(sums, "sum")
        return {
            name: RewardStatistics(pull / pulled if pulled else 0.0, score / scored)
            for name, (pulls, pull, pulled, score, scored) in zip(names, sums.tolist(), strict=True)
            if pulls and scored
        }


def _summed(means: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Return sum and count of what means are of."""
    return sum(mean * count for mean, count in means), sum(count for _, count in means)
