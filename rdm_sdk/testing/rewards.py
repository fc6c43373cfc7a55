"""The contract kit for rewards: what every author should run, and what the SDK's own rewards have to pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rdm_sdk.errors import RewardError, said
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.resolve import RewardFuncs, resolve_rewards
from rdm_sdk.testing.batches import LATENT_CHANNELS, example_batch
from rdm_sdk.testing.checks import CHECKS
from rdm_sdk.testing.subject import Check, Subject


class RewardCheckError(AssertionError):
    """A reward does not keep its contract; the message lists every check that failed and what to do."""


class RewardCheckWarning(UserWarning):
    """A reward keeps its contract, and something about it is odd."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    status: Literal["passed", "failed", "skipped", "warning"]
    message: str
    """What is wrong and what to do, why it was skipped, or empty."""
    cause: BaseException | None = None
    """The reward's own exception, if it raised one."""


def check_reward(
    reward: RewardFuncs,
    *,
    batch: RewardBatch | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Check that a reward keeps the contract; see `CHECKS` for what that is.

    Args:
        reward: a `Reward`, a function, or a spec such as "acme/sharpness[radius=3]".
        batch: samples to try it on: at least two groups of at least two samples; by default the reward's own
            `example()`, or eight random ones (`example_batch`).
        expected_failures: check name to reason, for what is known and accepted; such a check must fail.

    Returns:
        The result of every check.

    Raises:
        RewardCheckError: a check failed, or one that was expected to fail did not.
    """
    results = run_reward_checks(reward, batch)
    problems = _problems(results, expected_failures or {})
    for result in results:
        if result.status == "warning":
            warnings.warn(f"{result.name}: {result.message}", RewardCheckWarning, stacklevel=2)
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        cause = next((result.cause for result in results if result.cause is not None), None)
        raise RewardCheckError(f"{_only(reward).name!r} does not keep the reward contract:\n{lines}") from cause
    return results


def run_reward_checks(reward: RewardFuncs, batch: RewardBatch | None = None) -> list[CheckResult]:
    """Run every check and return the results; a check whose prerequisite failed is skipped."""
    made = _only(reward)
    if made.capabilities.head:
        made.make_head(LATENT_CHANNELS)  # as the host does, for the features of the teacher in the kit's batch
    subject = Subject(made, batch or made.example() or example_batch(made))
    results: dict[str, CheckResult] = {}
    root: dict[str, str] = {}
    for own in CHECKS:
        unmet = next((root[name] for name in own.needs if name in root), None)
        if unmet is not None:
            root[own.name] = unmet
            results[own.name] = CheckResult(own.name, "skipped", f"{unmet} failed, so this was not run")
            continue
        results[own.name] = _outcome(own, subject)
        if results[own.name].status == "failed":
            root[own.name] = own.name
    return list(results.values())


def _outcome(check: Check, subject: Subject) -> CheckResult:
    try:
        remark = check.run(subject)
    except AssertionError as error:
        return CheckResult(check.name, "failed", str(error), error.__cause__)
    except Exception as error:
        message = f"the reward raised {said(error)}. It promises: {check.promise}"
        return CheckResult(check.name, "failed", message, error)
    if remark is None:
        return CheckResult(check.name, "passed", "")
    return CheckResult(check.name, "warning" if remark.kind == "warning" else "skipped", remark.text)


def parametrize_reward_checks(
    make: Callable[[], RewardFuncs],
    *,
    batch: Callable[[], RewardBatch] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> Any:
    """Return a pytest decorator that runs a test once per check, as its argument `check`; call it: `check()`.

    Args:
        make: makes the reward; called once, when the first check runs.
        batch: makes the samples, as in `check_reward`.
        expected_failures: as in `check_reward`.

    Example:
        @parametrize_reward_checks(lambda: Sharpness(radius=3))
        def test_contract(check):
            check()
    """
    import pytest  # only authors' tests need it

    expected = expected_failures or {}
    _problems([], {name: reason for name, reason in expected.items() if name not in [c.name for c in CHECKS]})
    cache: dict[str, CheckResult] = {}

    def run(name: str) -> None:
        if not cache:
            results = run_reward_checks(make(), None if batch is None else batch())
            cache.update({result.name: result for result in results})
        result = cache[name]
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "warning":
            warnings.warn(f"{name}: {result.message}", RewardCheckWarning, stacklevel=2)
        problems = _problems([result], {name: expected[name]} if name in expected else {})
        if problems:
            raise RewardCheckError(problems[0]) from result.cause

    return pytest.mark.parametrize("check", [pytest.param(_bound(run, c.name), id=c.name) for c in CHECKS])


def _bound(run: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: run(name)


def _problems(results: list[CheckResult], expected: Mapping[str, str]) -> list[str]:
    known = [own.name for own in CHECKS]
    unknown = [name for name in expected if name not in known]
    if unknown:
        raise ValueError(
            f"expected_failures names {unknown[0]!r}, which is no check; the checks are {', '.join(known)}"
        )
    problems = [f"{r.name}: {r.message}" for r in results if r.status == "failed" and r.name not in expected]
    problems += [
        f"{r.name}: was expected to fail ({expected[r.name]}), but {r.status}; remove it from expected_failures"
        for r in results
        if r.name in expected and r.status != "failed"
    ]
    return problems


def _only(reward: RewardFuncs) -> Reward:
    found = resolve_rewards(reward)
    if len(found) != 1:
        raise RewardError(f"one reward is checked at a time; got {', '.join(own.label for own in found)}")
    return found[0].reward
