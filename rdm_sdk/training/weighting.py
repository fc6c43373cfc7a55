"""How much each reward counts beside distribution matching, step by step: `fixed`, `balance`, `constraint`.

GNDMR combines R_dm with external rewards "through adaptive weighting" (arXiv 2603.28460); how is our reading, see
docs/method.md. A strategy sees what every reward did in the last optimizer step and says what it weighs in the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

from pydantic import Field

from rdm_sdk.errors import CheckpointError, ConfigError, nearest, shown
from rdm_sdk.rewards.base import RewardConfig
from rdm_sdk.rewards.grammar import NAME, Parser
from rdm_sdk.rewards.spec import checked_model

ANCHOR = "dm"
"""The reward that the others are weighed against; its own weight is the one in the spec, always."""


@dataclass(frozen=True)
class RewardStatistics:
    """What one reward did in an optimizer step, averaged over its micro-batches and processes."""

    pull: float
    """Mean |g| of its normalized, unweighted gradient at the student's x_0. For a scored reward, of the policy
    gradient that its advantages make there, so that the two routes compare. 0 where a reward is only watched (weight 0)
    and its gradient is not asked for."""
    score: float
    """Mean score, in the reward's native units."""


Weights: TypeAlias = Mapping[str, float]
Statistics: TypeAlias = Mapping[str, RewardStatistics]


@runtime_checkable
class Weighting(Protocol):
    """A weighting strategy: any object with these three methods."""

    def weigh(self, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
        """Return every reward's weight in optimizer step `step` (from 0).

        Called once per optimizer step, in order.

        Args:
            targets: reward name to the weight that the user gave it.
            statistics: of the step before; empty at step 0. A reward that was skipped, or is for none of the samples,
                is missing.
            step: the coming optimizer step.
        """

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must keep. All of it is logged as `weighting/<key>` too: the weights' cause."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""


class FixedConfig(RewardConfig):
    """When rewards beside the anchor count: not yet, more and more, fully, less and less."""

    cold_start: int = Field(default=0, ge=0)
    """Optimizer steps with distribution matching alone."""
    ramp: int = Field(default=0, ge=0)
    """Steps over which the weights then rise linearly to their full size."""
    half_life: int = Field(default=0, ge=0)
    """Steps after which the weights, once full, have halved; 0 is no decay."""


class Fixed:
    """The weights in the spec, after a cold start and a ramp: DMDR's sum (arXiv 2511.13649), and every control."""

    Config: type[FixedConfig] = FixedConfig
    needs_anchor = False

    def __init__(self, config: FixedConfig | None = None) -> None:
        self.config: Any = config or self.Config()
        self._state: dict[str, float] = {}

    def weigh(self, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
        timing = schedule(self.config, step)
        scales = self._scales({n: t for n, t in targets.items() if n != ANCHOR and t}, targets, statistics, step)
        return {n: t if n == ANCHOR else t * timing * scales.get(n, 0.0) for n, t in targets.items()}

    def _scales(self, others: Weights, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
        """Return the factor on each reward's own weight; strategies differ in nothing else."""
        return dict.fromkeys(others, 1.0)

    def _average(self, name: str, value: float, decay: float) -> float:
        """Keep an exponential moving average, started at its first value."""
        before = self._state.get(name, value)
        self._state[name] = decay * before + (1 - decay) * value
        return self._state[name]

    def state_dict(self) -> dict[str, float]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if not all(isinstance(value, (int, float)) for value in state.values()):
            raise CheckpointError(f"the weighting's state must be numbers by name; got {dict(state)!r}")
        self._state = {name: float(value) for name, value in state.items()}


class BalanceConfig(FixedConfig):
    """Options of `balance`."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving averages of the pulls."""
    max_weight: float = Field(default=100.0, gt=0)
    """No weight grows beyond this."""


class Balance(Fixed):
    """Each reward gets a set share of distribution matching's pull: lambda_k = rho_k EMA|g_dm| / EMA|g_k|, clamped.

    The weight rho_k in the spec is that share: 0.5 pulls half as hard as `dm`, whatever the reward's units, and less
    and less as the student comes to match its teacher. Nothing counts in the first step, when no pull is known yet.
    """

    Config = BalanceConfig
    needs_anchor = True

    def _scales(self, others: Weights, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
        for name, of in statistics.items():
            if targets[name]:
                self._average(f"pull/{name}", of.pull, self.config.decay)
        anchor = abs(targets[ANCHOR]) * self._state.get(f"pull/{ANCHOR}", 0.0)
        scales = {}
        for name, target in others.items():
            pull = self._state.get(f"pull/{name}", 0.0)
            # A reward that does not pull yet (all its groups constant) has no share to give.
            scales[name] = min(anchor / pull, self.config.max_weight / abs(target)) if pull > 0 else 0.0
        return scales


class ConstraintConfig(BalanceConfig):
    """Options of `constraint`."""

    slack: float = Field(default=0.1, gt=0)
    """The budget: how far the matching residual may exceed the lowest that the run has seen, as a share of it."""
    rate: float = Field(default=0.1, gt=0)
    """Step size of the dual ascent, in log-weight per step at a violation of the whole budget."""
    decay: float = Field(default=0.95, ge=0, lt=1)


class Constraint(Fixed):
    """Maximize the rewards subject to a fidelity budget, by dual ascent.

    maximize sum_k rho_k R_k subject to residual <= (1 + slack) * lowest residual so far, where the residual is the
    moving average of |D_real - D_fake| / |x_0 - D_real|, `dm`'s pull. The multiplier that all rewards share follows the
    violation: log m <- log m + rate * (budget - residual) / (slack * lowest), so weights fall while fidelity is
    worse than the budget and rise while there is room. It acts from the end of the cold start, in which the lowest
    counts from the highest on: a critic that only begins to learn is near the teacher, and hardly pulls, however bad
    the match.
    """

    Config = ConstraintConfig
    needs_anchor = True

    def _scales(self, others: Weights, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
        # A pull of 0 is no match: the critic is still the teacher, in a warmup's first step, and nothing is below that.
        if ANCHOR in statistics and statistics[ANCHOR].pull > 0:
            residual = self._average("residual", statistics[ANCHOR].pull, self.config.decay)
            if step < self.config.cold_start and residual > self._state.get("highest", 0.0):
                self._state["highest"] = self._state["lowest"] = residual
            lowest = self._state["lowest"] = min(self._state.get("lowest", math.inf), residual)
            room = (1 + self.config.slack) * lowest - residual
            if step >= self.config.cold_start:
                change = self.config.rate * max(-1.0, min(1.0, room / (self.config.slack * lowest)))
                # Bounded below, so that it comes back from a long violation in a reasonable time.
                self._state["log_multiplier"] = max(self._state.get("log_multiplier", 0.0) + change, -MAX_LOG_DECREASE)
        multiplier = math.exp(min(self._state.get("log_multiplier", 0.0), 50.0))
        scales = {name: min(multiplier, self.config.max_weight / abs(target)) for name, target in others.items()}
        if others and multiplier > max(scales.values()):  # no wind-up beyond what the clamp lets through
            self._state["log_multiplier"] = math.log(max(scales.values()))
        return scales


def weigh(weighting: Weighting, targets: Weights, statistics: Statistics, step: int) -> dict[str, float]:
    """Ask a strategy for the weights of a step, and check that it answered for every reward and no other.

    Raises:
        ConfigError: a name is missing or unknown, a weight is not a finite number, or one that is 0 is raised.
    """
    weights = weighting.weigh(targets, statistics, step)
    odd = sorted(weights.keys() ^ targets.keys())
    if odd:
        raise ConfigError(
            f"{type(weighting).__name__}.weigh must return one weight per reward ({', '.join(targets)}); "
            f"{odd[0]!r} is {'unknown' if odd[0] in weights else 'missing'}.{nearest(odd[0], targets)}"
        )
    for name, weight in weights.items():
        given: object = weight  # type checkers believe the annotation
        if not isinstance(given, Real) or not math.isfinite(given):
            raise ConfigError(
                f"{type(weighting).__name__}.weigh gave {name!r} the weight {weight!r}; it must be finite, and a "
                "number (of a tensor, its item())"
            )
        if weight and not targets[name]:
            raise ConfigError(
                f"{type(weighting).__name__}.weigh gave {name!r} the weight {weight!r}, but it is only watched (its "
                "own weight is 0); give it one of its own, which the strategy can make 0 for as long as it likes"
            )
    return {name: float(weight) for name, weight in weights.items()}


def state_of(weighting: Weighting) -> dict[str, float]:
    """Return a strategy's state, as it is logged and as a checkpoint can hold it.

    Raises:
        ConfigError: it is something else than numbers by name, which the first checkpoint could not be written with.
    """
    state: object = weighting.state_dict()
    owner = f"{type(weighting).__name__}.state_dict"
    if not isinstance(state, Mapping):
        raise ConfigError(f"{owner} must return a dictionary of numbers by name; got {shown(state, 60)}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise ConfigError(
                f"{owner} must return numbers by name, which are logged and kept in checkpoints; got "
                f"{shown(value, 60)} for {name!r}. Take item() of a tensor, and an entry for each number of a "
                "list or a dictionary"
            )
    # Numbers of NumPy are none for JSON.
    return {name: value if isinstance(value, int) else float(value) for name, value in state.items()}


def schedule(config: FixedConfig, step: int) -> float:
    """Return the factor of cold start, ramp and decay at an optimizer step, in [0, 1]."""
    since = step - config.cold_start
    if since < 0:
        return 0.0
    if since < config.ramp:
        return (since + 1) / (config.ramp + 1)
    return 0.5 ** ((since - config.ramp) / config.half_life) if config.half_life else 1.0


MAX_LOG_DECREASE = math.log(1000.0)
"""`constraint` lowers weights by no more than a factor of a thousand, which is nothing left."""

STRATEGIES: dict[str, Callable[..., Fixed]] = {"fixed": Fixed, "balance": Balance, "constraint": Constraint}


def make_weighting(spec: str) -> Fixed:
    """Return the strategy that a spec names: "fixed", "balance[decay=0.95]", "constraint[slack=0.2,cold_start=50]".

    Raises:
        ConfigError: an unknown strategy, an unknown option, or a value that it cannot have.
    """
    parser = Parser(spec, "weighting=", "It is one strategy with options, such as 'balance[decay=0.95]'", ConfigError)
    name = parser.take(NAME)
    if name is None:
        parser.fail("expected the name of a strategy here")
    if name not in STRATEGIES:
        parser.fail(
            f"there is no weighting {shown(name, 60)}.{nearest(name, STRATEGIES)} There are: {', '.join(STRATEGIES)}; "
            "RDMTrainer(weighting=...) takes an object of your own",
            at=0,
        )
    options = parser.options()
    if not parser.at_end():
        parser.fail("expected the end here" if options else "expected '[' or the end here")
    strategy: Any = STRATEGIES[name]
    made: Fixed = strategy(checked_model(strategy.Config, options, f"weighting {name!r}", ConfigError))
    return made
