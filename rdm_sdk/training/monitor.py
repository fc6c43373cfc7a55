"""What a run says of itself: every figure of a step, averaged until the next log, and what the weighting goes by."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

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
        self._values: dict[str, list[float]] = defaultdict(list)
        self._pulls: dict[str, list[float]] = defaultdict(list)
        self._scores: dict[str, list[float]] = defaultdict(list)

    def log(self, name: str, value: Tensor | float) -> None:
        """Take a figure down."""
        self._values[name].append(value.detach().item() if isinstance(value, Tensor) else float(value))

    def averages(self) -> dict[str, float]:
        """Return the mean of every figure since the last call."""
        result = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return result

    def evaluation(self, result: Evaluation, skips: bool) -> None:
        """Take down what rewards took, and which were skipped (where that is allowed)."""
        for name, seconds in result.seconds.items():
            self.log(f"rewards/{name}/seconds", seconds)
            if skips:
                self.log(f"rewards/{name}/skipped", float(name in result.skipped))
        for name, error in result.skipped.items():
            logger.warning("reward %r was skipped: %s: %s", name, type(error).__name__, error)

    def reward(self, judged: WeightedReward, output: RewardOutput, group_size: int) -> None:
        """Take down what a reward said of a micro-batch."""
        scores, name = output.scores, judged.label
        valid = scores[~scores.isnan()]
        mean = valid.mean().item()
        self._scores[name].append(mean)
        self.log(f"rewards/{name}/mean", mean)
        self.log(f"rewards/{name}/std", valid.std() if len(valid) > 1 else 0.0)
        self.log(f"rewards/{name}/nan", scores.isnan().sum())
        self.log(f"rewards/{name}/zero_std", zero_std_share(scores, group_size))
        if output.magnitude is not None:
            self.log(f"{name}/residual", output.magnitude.mean())
        if judged.route == "advantage":
            self.log("frac_reward_zero_std", zero_std_share(scores, group_size))

    def pulls(self, pulls: Mapping[str, float]) -> None:
        """Take down the mean |normalized, unweighted gradient| of each reward in a micro-batch."""
        for name, pull in pulls.items():
            self._pulls[name].append(pull)
            self.log(f"{name}/pull", pull)

    def weighting(self, weights: Mapping[str, float], strategy: Weighting) -> None:
        """Take down the weights of an optimizer step and what they come from."""
        for name, weight in weights.items():
            self.log(f"weights/{name}", weight)
        for name, value in strategy.state_dict().items():
            self.log(f"weighting/{name}", value)

    def step_statistics(
        self, names: Mapping[str, float], processes: Processes, device: torch.device
    ) -> dict[str, RewardStatistics]:
        """Return what each reward did since the last call, the same on every process; skipped rewards are missing."""
        sums = torch.zeros(len(names), 3, dtype=torch.float64, device=device)
        for row, name in enumerate(names):
            pulls, scores = self._pulls.get(name, []), self._scores.get(name, [])
            if pulls and scores:
                sums[row] = torch.tensor([sum(pulls) / len(pulls), sum(scores) / len(scores), 1.0])
        self._pulls.clear()
        self._scores.clear()
        sums = processes.reduce(sums, "sum")
        return {
            name: RewardStatistics(float(pull / count), float(score / count))
            for name, (pull, score, count) in zip(names, sums.tolist(), strict=True)
            if count
        }
