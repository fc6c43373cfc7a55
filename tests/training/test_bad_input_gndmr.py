"""Bad input to weighting, reuse, samplers and routes: a clear error before the base is loaded (acceptance 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digit_runs import brightness

from rdm_sdk import ConfigError, RDMConfig, RDMTrainer, RewardError, digits
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.training.weighting import Balance

Make = Callable[..., RDMTrainer]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_iterations": 0}, "num_iterations=0 .*at least 1"),
        ({"num_iterations": -2}, "num_iterations=-2 .*at least 1"),
        ({"num_iterations": 2, "sampler": "ode"}, "num_iterations=2 .*sampler='ode'.*random sampler"),
        ({"matching": "path"}, "matching='path' .*sampler='renoise' .*use sampler='ode'"),
        ({"matching": "path", "sampler": "cps"}, "matching='path' .*sampler='cps'"),
        ({"num_iterations": 2, "num_inference_steps": 1}, "num_iterations=2 .*num_inference_steps=1 .*two steps"),
        ({"epsilon": 0.0}, r"epsilon=0\.0 .*positive"),
        ({"epsilon": -0.2}, r"epsilon=-0\.2 .*positive"),
        ({"epsilon": float("nan")}, r"epsilon=nan .*positive"),
        ({"min_effective_sample_size": -0.1}, r"min_effective_sample_size=-0\.1 .*\[0, 1\]"),
        ({"min_effective_sample_size": 1.5}, r"min_effective_sample_size=1\.5 .*\[0, 1\]"),
        ({"min_effective_sample_size": 16}, r"min_effective_sample_size=16 .*share"),
        ({"importance_sampling_cap": 0.9}, r"importance_sampling_cap=0\.9 .*at least 1"),
        ({"importance_sampling_cap": float("nan")}, "importance_sampling_cap=nan .*at least 1"),
        ({"sampler": "cps", "eta": 0.0}, r"eta=0\.0 .*\(0, 1\]"),
        ({"sampler": "cps", "eta": 1.1}, r"eta=1\.1 .*\(0, 1\]"),
        ({"sampler": "sde", "eta": 0.0}, r"eta=0\.0 .*positive"),
        ({"sampler": "sde", "eta": -0.5}, r"eta=-0\.5 .*positive"),
        ({"sampler": "renose"}, r"sampler='renose' .*Did you mean 'renoise'\?"),
        ({"sampler": "euler"}, "sampler='euler' .*one of renoise, cps, sde, ode"),
        ({"spread": "stratifed"}, r"spread='stratifed' .*Did you mean 'stratified'\?"),
        ({"critic_correction": "other"}, r"critic_correction='other' .*Did you mean 'others'\?"),
        ({"ratio_reduction": "men"}, r"ratio_reduction='men' .*Did you mean 'mean'\?"),
        ({"reward_route": "advantages"}, r"reward_route='advantages' .*Did you mean 'advantage'\?"),
        (
            {"reward_route": "tilt[clip]"},
            r"reward_route='tilt\[clip\]' at column 10: 'clip' is no exception; write 'name=route'",
        ),
        ({"reward_route": "tilt[a=gradient,a=tilt]"}, "at column 23: it names 'a' twice"),
        ({"reward_route": "tilt[a=slope]"}, "at column 8: there is no route 'slope'.*gradient, advantage, tilt"),
        ({"reward_route": "tilt[a=gradient"}, r"column 16: expected ',' or '\]'.*'tilt\[ink=gradient\]'"),
        ({"normalization": "rms"}, "normalization='rms' .*one of group, sample"),
        (
            {"multi_objective_aggregation": "sum_then_normalise"},
            r"multi_objective_aggregation=.*Did you mean 'sum_then_normalize'\?",
        ),
        ({"weighting": "balanced"}, r"no weighting 'balanced'\. Did you mean 'balance'\? There are: fixed, balance"),
        ({"weighting": "adaptive"}, "no weighting 'adaptive'.*RDMTrainer.weighting=...."),
        ({"weighting": "balance[deccay=0.5]"}, r"weighting 'balance' has no option 'deccay'\. Did you mean 'decay'\?"),
        ({"weighting": "balance[decay=1]"}, "weighting 'balance', option decay: .*got 1"),
        ({"weighting": "fixed[cold_start=-1]"}, "weighting 'fixed', option cold_start: .*got -1"),
        ({"weighting": "constraint[slack=0]"}, "weighting 'constraint', option slack: .*got 0"),
        ({"weighting": "constraint[rate=-1]"}, "weighting 'constraint', option rate: .*got -1"),
        ({"weighting": "fixed[decay=0.9]"}, "weighting 'fixed' has no option 'decay'"),
        ({"weighting": "0.5*balance"}, r"weighting='0\.5\*balance' at column 1: expected the name.*one strategy"),
        ({"weighting": "fixed + balance"}, "weighting='fixed . balance' at column 7: .*one strategy"),
        ({"weighting": "balance:v2"}, "weighting='balance:v2' at column 8: .*one strategy"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    small_config: Callable[..., RDMConfig], tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """The message names the setting, its value and what it must be; a misspelling, its nearest name."""
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, **settings)


@pytest.mark.parametrize("spec", ["", "balance[", "balance[decay]", "[cold_start=1]", "balance[decay=]"])
def test_a_malformed_weighting_is_refused(small_config: Callable[..., RDMConfig], tmp_path: Path, spec: str) -> None:
    """Whatever is wrong with its syntax, the error is about weightings."""
    with pytest.raises(ConfigError, match=r"cannot read weighting=.* at column "):
        small_config(tmp_path, weighting=spec)


@pytest.mark.parametrize("name", ["balance", "constraint", "constraint[cold_start=5]"])
@pytest.mark.parametrize("rewards", ["legibility", "0*dm + legibility"])
def test_adaptive_weights_need_dm(make_trainer: Make, tmp_path: Path, name: str, rewards: str) -> None:
    """Without `dm`, or with it at weight 0, there is nothing to weigh against, and no residual to keep."""
    with pytest.raises(ConfigError, match=r"weighs rewards against 'dm', and this run has none.*'dm \+ 0\.5\*"):
        make_trainer(tmp_path, rewards, weighting=name, model="no/such/model")


ONE_SCORED = {"reward_route": "gradient[legibility=advantage]"}


@pytest.mark.parametrize(
    ("rewards", "settings", "words"),
    [
        (brightness, {"sampler": "ode"}, "'brightness' acts through its scores.*sampler='ode'"),
        (["dm", brightness], {"sampler": "ode"}, "'brightness' acts through its scores.*sampler='ode'"),
        ("dm + legibility", {"sampler": "ode", "reward_route": "advantage"}, "'legibility' acts through its scores"),
        (["dm", Legibility()], ONE_SCORED | {"num_inference_steps": 1}, "'legibility' acts through.*_steps=1"),
        (["dm", Legibility()], ONE_SCORED | {"num_generations": 1}, "'legibility' acts by its scores.*generations=1"),
    ],
    ids=["alone", "beside", "route", "one-step", "no-group"],
)
def test_scores_need_something_random(
    make_trainer: Make, tmp_path: Path, rewards: Any, settings: dict[str, Any], words: str
) -> None:
    """A scored reward without random transitions, or without a group, is refused by name."""
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, rewards, model="no/such/model", **settings)


def test_watching_needs_nothing_random(make_trainer: Make, tmp_path: Path) -> None:
    """At weight 0 the same reward is only watched, and a deterministic student is fine."""
    trainer = make_trainer(tmp_path, ["dm", (brightness, 0.0)], sampler="ode", max_steps=1, critic_steps=1)
    trainer.train()
    assert "rewards/brightness/mean" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"legibilty": 0.5}, r"'legibilty', which is not among the rewards\. Did you mean 'legibility'\?.*dm, legib"),
        ({"dm": 1.0, "hps": 0.5}, "reward_weights names 'hps', which is not among the rewards"),
        ({"legibility": float("nan")}, "finite numbers; got nan for 'legibility'"),
        ({"legibility": "0.5"}, "finite numbers; got '0.5' for 'legibility'"),
    ],
)
def test_weights_for_unknown_rewards_are_refused(
    make_trainer: Make, tmp_path: Path, weights: dict[str, Any], words: str
) -> None:
    """By name, with the nearest one that is there."""
    with pytest.raises(RewardError, match=words):
        make_trainer(tmp_path, "dm + legibility", reward_weights=weights, model="no/such/model")


def test_weights_by_name_multiply_those_of_the_spec(make_trainer: Make, tmp_path: Path) -> None:
    """Rewards that are not named keep theirs."""
    trainer = make_trainer(tmp_path, "dm + 0.5*legibility + jpeg", reward_weights={"legibility": 0.5, "jpeg": -2.0})
    assert trainer.weights == {"dm": 1.0, "legibility": 0.25, "jpeg": -2.0}


class NoState:
    """Only weighs."""

    def weigh(self, targets: dict[str, float], statistics: object, step: int) -> dict[str, float]:
        return dict(targets)


@pytest.mark.parametrize("weighting", [7, NoState(), Balance, "balance"], ids=["number", "no-state", "class", "name"])
def test_a_weighting_that_is_none_is_refused(
    small_config: Callable[..., RDMConfig], tmp_path: Path, weighting: Any
) -> None:
    """The argument takes an object with all three methods; names belong into the config."""
    with pytest.raises(ConfigError, match="weighting must be an object with weigh, state_dict and load_state_dict"):
        RDMTrainer("no/such/model", "dm + legibility", small_config(tmp_path), digits.prompts(), weighting=weighting)


def test_two_weightings_are_refused(small_config: Callable[..., RDMConfig], tmp_path: Path) -> None:
    """An object beside a name: one of them would be dropped."""
    config = small_config(tmp_path, weighting="constraint")
    with pytest.raises(ConfigError, match=r"two weightings were given: an object, and .*'constraint'"):
        RDMTrainer("no/such/model", "dm + legibility", config, digits.prompts(), weighting=Balance())
