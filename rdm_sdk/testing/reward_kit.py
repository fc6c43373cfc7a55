"""The contract kit for rewards: what every author should run, and what the SDK's own rewards have to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.resolve import RewardFuncs, resolve_rewards
from rdm_sdk.testing.batches import LATENT_CHANNELS, example_batch
from rdm_sdk.testing.kit import CheckResult, ContractError, ContractWarning, Kit
from rdm_sdk.testing.reward_checks import CHECKS
from rdm_sdk.testing.reward_subject import Subject


class RewardCheckError(ContractError):
    """A reward does not keep its contract; the message lists every check that failed and what to do."""


class RewardCheckWarning(ContractWarning):
    """A reward keeps its contract, and something about it is odd."""


KIT = Kit("reward", CHECKS, RewardCheckError, RewardCheckWarning)


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
    made = _only(reward)
    return KIT.check(_subject(made, batch), expected_failures, f"{made.name!r} does not keep the reward contract")


def run_reward_checks(reward: RewardFuncs, batch: RewardBatch | None = None) -> list[CheckResult]:
    """Run every check and return the results; a check whose prerequisite failed is skipped."""
    return KIT.run(_subject(_only(reward), batch))


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
    return KIT.parametrize(lambda: _subject(_only(make()), None if batch is None else batch()), expected_failures)


def _subject(made: Reward, batch: RewardBatch | None) -> Subject:
    tried = batch or made.example() or example_batch(made)
    if made.capabilities.head and tried.context is not None:  # as the host does
        head = made.make_head(LATENT_CHANNELS, 0)
        tried = replace(tried, context=replace(tried.context, head=lambda role: head))
    if min(len(tried) // tried.group_size, tried.group_size) < 2:
        raise RewardError(
            f"the contract of {made.name!r} is checked on two or more groups of two or more samples: of fewer, chunks "
            f"and shuffled batches show nothing; got {len(tried)} in groups of {tried.group_size}. Let example() (or "
            "batch=) return four or more: RewardBatch.from_images(images, prompts, 2, columns)"
        )
    return Subject(made, tried)


def _only(reward: RewardFuncs) -> Reward:
    found = resolve_rewards(reward)
    if len(found) != 1:
        raise RewardError(f"one reward is checked at a time; got {', '.join(chosen.label for chosen in found)}")
    return found[0].reward
