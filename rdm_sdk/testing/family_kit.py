"""The contract kit for model families: what every author should run, and what the SDK's own families have to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rdm_sdk.testing.family_checks import TEACHER_CHECKS
from rdm_sdk.testing.family_subject import ModelSubject
from rdm_sdk.testing.family_training_checks import TRAINING_CHECKS
from rdm_sdk.testing.kit import Check, CheckResult, ContractError, ContractWarning, Kit

MODEL_CHECKS: list[Check] = [*TEACHER_CHECKS, *TRAINING_CHECKS]
"""The contract of model families, in the order in which the checks run."""


class ModelCheckError(ContractError):
    """A family does not keep its contract; the message lists every check that failed and what to do."""


class ModelCheckWarning(ContractWarning):
    """A family keeps its contract, and something about it is odd."""


KIT = Kit("family", MODEL_CHECKS, ModelCheckError, ModelCheckWarning)


def check_model(make: Callable[[], Any], *, expected_failures: Mapping[str, str] | None = None) -> list[CheckResult]:
    """Check that a model family keeps the contract; see `MODEL_CHECKS` for what that is.

    The kit runs the true pipeline beside the family, in float32 on the CPU: give it a tiny one, with random weights
    that are not near zero (the SDK's `tests/helpers/tiny_pipelines.py` has nine).

    Args:
        make: makes a pipeline whose class has a registered family, or a family; called several times, and must give
            the same weights every time.
        expected_failures: check name to reason, for what is known and accepted; such a check must fail.

    Returns:
        The result of every check.

    Raises:
        ModelCheckError: a check failed, or one that was expected to fail did not.
        ModelError: there is no family for what `make` makes.
    """
    subject = ModelSubject(make)
    who = f"{type(subject.family).__name__} does not keep the contract of model families"
    return KIT.check(subject, expected_failures, who)


def parametrize_model_checks(make: Callable[[], Any], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """Return a pytest decorator that runs a test once per check, as its argument `check`; call it: `check()`.

    Args:
        make: as in `check_model`; first called when the first check runs.
        expected_failures: as in `check_model`.

    Example:
        @parametrize_model_checks(tiny_auraflow)
        def test_contract(check):
            check()
    """
    return KIT.parametrize(lambda: ModelSubject(make), expected_failures)
