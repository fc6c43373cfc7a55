"""Weighting strategies on hand-made statistics: the formulas against independent computation, and their promises."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from rdm_sdk import CheckpointError, ConfigError
from rdm_sdk.training.weighting import RewardStatistics, Weighting, make_weighting, state_of, weigh

TARGETS = {"dm": 1.0, "a": 0.5, "b": -0.25, "watched": 0.0}


def pulls(**by_name: float) -> dict[str, RewardStatistics]:
    """Return statistics with these pulls."""
    return {name: RewardStatistics(pull, 0.0) for name, pull in by_name.items()}


def random_pulls(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Return some steps' pulls of the three rewards that count."""
    draw = random.Random(seed)
    return [{name: draw.uniform(0.2, 2.0) for name in ("dm", "a", "b")} for _ in range(count)]


def run(strategy: Weighting, steps: list[dict[str, float]], targets: Mapping[str, float] = TARGETS) -> list[dict]:
    """Return the weights of every step as a trainer asks for them: the first without statistics."""
    weights = [weigh(strategy, targets, {}, 0)]
    return weights + [weigh(strategy, targets, pulls(**p), i) for i, p in enumerate(steps, start=1)]


# ---- fixed, and the schedule that all share ---------------------------------------------------------------------


def test_fixed_is_the_spec() -> None:
    """Without options every weight is the one the user gave, whatever happens."""
    strategy = make_weighting("fixed")
    assert run(strategy, random_pulls(5)) == [TARGETS] * 6
    assert strategy.state_dict() == {}


def test_cold_start_ramp_and_half_life() -> None:
    """Nothing for two steps, then 1/4, 2/4, 3/4, then full, halved after four more steps; `dm` is left alone."""
    strategy = make_weighting("fixed[cold_start=2,ramp=3,half_life=4]")
    factors = [0, 0, 0.25, 0.5, 0.75, 1, 0.5 ** (1 / 4), 0.5**0.5, 0.5**0.75, 0.5, 0.5 ** (5 / 4)]
    for step, factor in enumerate(factors):
        weights = weigh(strategy, TARGETS, {}, step)
        expected = {"dm": 1.0, "a": 0.5 * factor, "b": -0.25 * factor, "watched": 0.0}
        assert weights == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("name", ["fixed", "balance", "constraint"])
def test_the_schedule_applies_to_every_strategy(name: str) -> None:
    """With a cold start of three steps and a ramp of one, the weights are 0, then half of the plain, then equal."""
    steps = random_pulls(6)
    timed, plain = run(make_weighting(f"{name}[cold_start=3,ramp=1]"), steps), run(make_weighting(name), steps)
    for step in range(3):
        assert timed[step] == {"dm": 1.0, "a": 0.0, "b": 0.0, "watched": 0.0}
    if name != "constraint":  # whose multiplier stands still during the cold start
        assert timed[3] == pytest.approx({n: w if n == "dm" else w / 2 for n, w in plain[3].items()})
        assert timed[4:] == plain[4:]
    assert all(row["a"] > 0 > row["b"] for row in timed[3:])


# ---- balance ----------------------------------------------------------------------------------------------------


def test_balance_equals_its_formula() -> None:
    """lambda_k = rho_k |w_dm| EMA|g_dm| / EMA|g_k|, the averages started at their first values."""
    targets = {"dm": 2.0, "a": 0.5, "b": -0.25}
    steps, decay = random_pulls(8), 0.7
    got = run(make_weighting(f"balance[decay={decay}]"), steps, targets)
    assert got[0] == {"dm": 2.0, "a": 0.0, "b": 0.0}  # no pull is known yet
    average = dict(steps[0])
    for step, seen in enumerate(steps, start=1):
        if step > 1:
            average = {n: decay * average[n] + (1 - decay) * seen[n] for n in average}
        expected = {n: targets[n] * 2.0 * average["dm"] / average[n] for n in ("a", "b")}
        assert got[step] == pytest.approx({"dm": 2.0} | expected, rel=1e-12)


@pytest.mark.parametrize("anchor", [1.0, -2.0])
def test_stationary_pulls_get_exactly_their_share(anchor: float) -> None:
    """With constant pulls, each reward pulls rho times as hard as `dm`, whatever the units."""
    targets = {"dm": anchor, "a": 0.5, "b": -0.25}
    seen = {"dm": 0.3, "a": 40.0, "b": 0.02}
    weights = run(make_weighting("balance"), [seen] * 5, targets)[-1]
    for name, share in (("a", 0.5), ("b", -0.25)):
        assert weights[name] * seen[name] / (abs(anchor) * seen["dm"]) == pytest.approx(share, rel=1e-12)


def test_balance_is_clamped() -> None:
    """No weight grows beyond `max_weight`, in either sign; those below it are untouched."""
    weights = run(make_weighting("balance[max_weight=3]"), [{"dm": 1.0, "a": 1e-6, "b": 1e-6}])[-1]
    assert weights == {"dm": 1.0, "a": 3.0, "b": -3.0, "watched": 0.0}
    assert run(make_weighting("balance[max_weight=3]"), [{"dm": 1.0, "a": 1.0, "b": 1.0}])[-1]["a"] == 0.5


def test_balance_without_a_pull() -> None:
    """A reward that has never pulled gets weight 0, no division by zero; one that is skipped keeps its average."""
    strategy = make_weighting("balance")
    assert run(strategy, [{"dm": 1.0, "a": 0.0}])[-1] == {"dm": 1.0, "a": 0.0, "b": 0.0, "watched": 0.0}
    strategy = make_weighting("balance")
    before, after = run(strategy, [{"dm": 1.0, "a": 2.0, "b": 1.0}, {"dm": 1.0, "b": 1.0}])[1:]
    assert after == before
    assert before["a"] == 0.25


# ---- constraint -------------------------------------------------------------------------------------------------


def reference_constraint(
    residuals: list[float], slack: float, rate: float, decay: float, cold_start: int = 0, ceiling: float = math.inf
) -> list[float]:
    """Return the multiplier after each step, written without the package: dual ascent on the log-multiplier."""
    multipliers, average, lowest, log_m = [], residuals[0], math.inf, 0.0
    for step, residual in enumerate(residuals, start=1):
        average = decay * average + (1 - decay) * residual
        lowest = min(lowest, average)
        budget = (1 + slack) * lowest
        if step >= cold_start:
            log_m += rate * min(max((budget - average) / (slack * lowest), -1.0), 1.0)
        log_m = min(log_m, math.log(ceiling)) if ceiling < math.inf else log_m
        multipliers.append(math.exp(log_m))
    return multipliers


def test_constraint_equals_its_formula() -> None:
    """The multiplier that all rewards share follows log m += rate clip((budget - residual) / (slack lowest))."""
    steps = random_pulls(30, seed=3)
    got = run(make_weighting("constraint[slack=0.2,rate=0.3,decay=0.8,max_weight=1000]"), steps)
    assert got[0] == TARGETS
    expected = reference_constraint([s["dm"] for s in steps], slack=0.2, rate=0.3, decay=0.8)
    assert max(expected) > 1.2
    assert min(expected) < 0.9
    for weights, multiplier in zip(got[1:], expected, strict=True):
        assert weights == pytest.approx({"dm": 1.0, "a": 0.5 * multiplier, "b": -0.25 * multiplier, "watched": 0.0})


def test_constraint_acts_from_the_end_of_the_cold_start() -> None:
    """During the cold start the lowest residual is learned, and the multiplier waits."""
    steps = [{"dm": residual, "a": 1.0, "b": 1.0} for residual in (1.0, 1.0, 1.0, 0.9, 0.8, 0.85, 1.2, 1.5, 0.8)]
    got = run(make_weighting("constraint[cold_start=5,decay=0.8]"), steps)
    residuals = [step["dm"] for step in steps]
    expected = reference_constraint(residuals, slack=0.1, rate=0.1, decay=0.8, cold_start=5)
    at_once = reference_constraint(residuals, slack=0.1, rate=0.1, decay=0.8)
    assert expected[3] == 1.0 < 1.3 < at_once[3]
    assert [row["a"] for row in got[:5]] == [0.0] * 5
    assert [row["a"] for row in got[5:]] == pytest.approx([0.5 * m for m in expected[4:]])


def test_constraint_counts_its_lowest_from_the_highest_of_the_cold_start() -> None:
    """A critic that only begins to learn hardly pulls; as a lowest that would leave rewards no room, ever."""
    learning, matching = [0.1, 0.3, 0.6, 1.0], [0.9, 0.8, 0.82, 1.3, 1.4]
    steps = [{"dm": residual, "a": 1.0} for residual in (*learning, *matching)]
    got = [row["a"] for row in run(make_weighting("constraint[cold_start=6,decay=0]"), steps)]
    expected = reference_constraint([*[1.0] * 4, *matching], slack=0.1, rate=0.1, decay=0, cold_start=6)
    assert got[6:] == pytest.approx([0.5 * m for m in expected[5:]])
    assert got[6] > 0.5  # at its lowest since the highest, so there is room
    assert got[9] < got[8] < got[7]  # a new highest after the cold start is beyond the budget
    at_once = [row["a"] for row in run(make_weighting("constraint[decay=0]"), steps)]
    assert at_once[9] < 0.3


def test_constraint_falls_beyond_the_budget_and_rises_within() -> None:
    """A residual above (1 + slack) lowest lowers the weights step by step, one below raises them again."""
    strategy = make_weighting("constraint[decay=0,slack=0.1]")
    steps = [1.0] * 3 + [1.05] * 3 + [1.2] * 3 + [5.0] * 3 + [1.0] * 3
    weights = [row["a"] for row in run(strategy, [{"dm": r, "a": 1.0} for r in steps])]
    changes = [after / before for before, after in pairwise(weights)]
    assert changes[:3] == pytest.approx([math.exp(0.1)] * 3)  # at the lowest: room for the whole budget
    assert changes[3:6] == pytest.approx([math.exp(0.05)] * 3)  # half of it left
    assert changes[6:9] == pytest.approx([math.exp(-0.1)] * 3)  # exceeded by the whole budget
    assert changes[9:12] == pytest.approx([math.exp(-0.1)] * 3)  # and no faster, however bad
    assert changes[12:] == pytest.approx([math.exp(0.1)] * 3)


def test_constraint_does_not_wind_up() -> None:
    """After a long time at the clamp, the first violation already lowers the weight."""
    strategy = make_weighting("constraint[decay=0,rate=0.5,max_weight=2]")
    weights = [row["a"] for row in run(strategy, [{"dm": 1.0}] * 200 + [{"dm": 9.0}], {"dm": 1.0, "a": 0.5})]
    assert weights[-2] == pytest.approx(2.0)
    assert weights[-1] == pytest.approx(2.0 * math.exp(-0.5))


def test_constraint_waits_until_the_critic_is_another_than_the_teacher() -> None:
    """A pull of exactly 0, as in a warmup's first step, is no lowest: nothing would be below it, ever."""
    steps = [{"dm": residual, "a": 1.0} for residual in (1.0, 0.9, 1.3, 1.2)]
    before, *got = run(make_weighting("constraint"), [{"dm": 0.0, "a": 1.0}, *steps])
    assert before == TARGETS
    assert got == run(make_weighting("constraint"), steps)


def test_constraint_waits_where_dm_was_skipped() -> None:
    """A step without the residual changes nothing."""
    strategy = make_weighting("constraint")
    before, after = run(strategy, [{"dm": 1.0, "a": 1.0}, {"a": 1.0}])[1:]
    assert after == before != TARGETS


# ---- State and the protocol -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["fixed[ramp=4]", "balance[decay=0.6]", "constraint[decay=0.6,cold_start=2]"])
def test_state_round_trip(spec: str) -> None:
    """A strategy that takes up another's state, by way of JSON, goes on exactly as that one does."""
    first, second, steps = make_weighting(spec), make_weighting(spec), random_pulls(8)
    run(first, steps[:4])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(5, 9):
        given = (TARGETS, pulls(**steps[step - 1]), step)
        assert weigh(second, *given) == weigh(first, *given)
    assert second.state_dict() == first.state_dict()
    assert bool(first.state_dict()) == (not spec.startswith("fixed"))


def test_state_that_is_no_state_is_refused() -> None:
    """Numbers by name, nothing else."""
    with pytest.raises(CheckpointError, match="must be numbers by name"):
        make_weighting("balance").load_state_dict({"pull/dm": "much"})  # type: ignore[dict-item]


class Answers:
    """A strategy that says what it is told to say."""

    def __init__(self, answer: dict[str, object], state: Any = MappingProxyType({})) -> None:
        self.answer, self.state = answer, state

    def weigh(self, targets: Mapping[str, float], statistics: object, step: int) -> dict[str, float]:
        return self.answer  # type: ignore[return-value]

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"dm": 1.0}, "one weight per reward .dm, jpeg.; 'jpeg' is missing"),
        ({"dm": 1.0, "jpeg": 1.0, "jpge": 1.0}, r"'jpge' is unknown\. Did you mean 'jpeg'"),
        ({"dm": 1.0, "jpeg": math.nan}, "gave 'jpeg' the weight nan; it must be finite"),
        ({"dm": 1.0, "jpeg": math.inf}, "gave 'jpeg' the weight inf; it must be finite"),
        ({"dm": 1.0, "jpeg": "1"}, "gave 'jpeg' the weight '1'"),
        ({"dm": 1.0, "jpeg": None}, "gave 'jpeg' the weight None"),
    ],
)
def test_a_wrong_answer_is_refused(answer: dict[str, object], words: str) -> None:
    """Every reward, no other, each a finite number; the message names the strategy's class."""
    with pytest.raises(ConfigError, match=rf"Answers\.weigh .*{words}"):
        weigh(Answers(answer), {"dm": 1.0, "jpeg": 0.5}, {}, 0)


@pytest.mark.parametrize("kind", [np.float32, np.int64, Fraction])
def test_numbers_of_other_libraries_are_numbers(kind: Any) -> None:
    """As weights, and in the state, which a checkpoint can then hold."""
    strategy = Answers({"dm": kind(1), "a": kind(2)}, {"average": kind(3)})
    assert weigh(strategy, {"dm": 1.0, "a": 0.5}, {}, 0) == {"dm": 1.0, "a": 2.0}
    assert json.loads(json.dumps(state_of(strategy))) == {"average": 3.0}


def test_integers_of_the_state_stay_integers() -> None:
    """A strategy that counts gets its count back."""
    assert type(state_of(Answers({}, {"calls": 3}))["calls"]) is int


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"average": torch.tensor(0.3)}, r"got tensor\(0.3000\) for 'average'. Take item\(\)"),
        ({"averages": {"a": 1.0}}, r"got \{'a': 1.0\} for 'averages'"),
        ({"phase": "late"}, "got 'late' for 'phase'"),
        ({1: 0.5}, "got 0.5 for 1"),
        (None, "a dictionary of numbers by name; got None"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused(state: Any, words: str) -> None:
    """A log and a checkpoint hold numbers by name; the message names the strategy's class and the entry."""
    with pytest.raises(ConfigError, match=rf"Answers\.state_dict must return .*{words}"):
        state_of(Answers({}, state))


def test_the_protocol_is_three_methods() -> None:
    """Any object with them is a strategy, the built-in ones too."""
    assert isinstance(Answers({}), Weighting)
    assert isinstance(make_weighting("balance"), Weighting)
    assert not isinstance(object(), Weighting)


def test_an_integer_is_a_weight() -> None:
    """An answer of integers comes back as floats."""
    assert weigh(Answers({"dm": 1, "a": 0}), {"dm": 1.0, "a": 0.5}, {}, 0) == {"dm": 1.0, "a": 0.0}


def test_what_is_only_watched_gets_no_weight() -> None:
    """Its gradient is not asked for, so a weight would do nothing, or by advantages alone."""
    with pytest.raises(ConfigError, match=r"gave 'a' the weight 5\.0, but it is only watched"):
        weigh(Answers({"dm": 1.0, "a": 5.0}), {"dm": 1.0, "a": 0.0}, {}, 0)
