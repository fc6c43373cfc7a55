"""What a contract kit is made of: checks with advice, their results, and a runner, whatever it is that is checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from rdm_sdk.errors import RDMError, described


class ContractError(AssertionError):
    """What was checked does not keep its contract; the message lists every check that failed and what to do."""


class ContractWarning(UserWarning):
    """A contract is kept, and something about it is odd."""


@dataclass(frozen=True)
class Remark:
    """What a check returns if it neither passes nor fails."""

    kind: Literal["skipped", "warning"]
    """"skipped" is a check that does not apply."""
    text: str


@dataclass(frozen=True)
class Check:
    """One check of a kit.

    `run` takes the subject, raises `AssertionError` with a message for its author, or returns a `Remark`. It may rely
    on the checks that it `needs`: it is not run where one of them failed.
    """

    name: str
    run: Callable[[Any], Remark | None]
    needs: tuple[str, ...]
    unless: Callable[[Any], str] = lambda subject: ""
    """Why it does not apply to a subject; empty where it does."""

    @property
    def promise(self) -> str:
        """What a subject that passes it keeps to."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    status: Literal["passed", "failed", "skipped", "warning"]
    message: str
    """What is wrong and what to do, why it was skipped, or empty."""
    cause: BaseException | None = None
    """The subject's own exception, if it raised one."""


Run = TypeVar("Run", bound=Callable[[Any], Remark | None])


def collector(checks: list[Check]) -> Callable[..., Callable[[Run], Run]]:
    """Return the decorator factory `check(*needs, unless=...)` that appends functions to a list of checks."""

    def check(*needs: str, **options: Callable[[Any], str]) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            checks.append(Check(run.__name__, run, needs, **options))
            return run

        return add

    return check


def run_checks(checks: Sequence[Check], subject: object, noun: str) -> list[CheckResult]:
    """Run every check on a subject, called a "reward" or so in messages; one whose prerequisite failed is skipped."""
    results: list[CheckResult] = []
    root: dict[str, str] = {}
    for check in checks:
        unmet = next((root[name] for name in check.needs if name in root), None)
        if unmet is not None:
            root[check.name] = unmet
            results.append(CheckResult(check.name, "skipped", f"{unmet} failed, so this was not run"))
            continue
        results.append(_outcome(check, subject, noun))
        if results[-1].status == "failed":
            root[check.name] = check.name
    return results


def _outcome(check: Check, subject: object, noun: str) -> CheckResult:
    try:
        reason = check.unless(subject)
        remark = Remark("skipped", reason) if reason else check.run(subject)
    except AssertionError as error:
        return CheckResult(check.name, "failed", str(error), error.__cause__)
    except Exception as error:
        message = f"the {noun} raised {described(error)}. It promises: {check.promise}"
        return CheckResult(check.name, "failed", message, error)
    if remark is None:
        return CheckResult(check.name, "passed", "")
    return CheckResult(check.name, remark.kind, remark.text)


@dataclass(frozen=True)
class Kit:
    """The contract of one kind of subject: its checks, and the errors and warnings by which authors hear of it."""

    noun: str
    """What a subject is called in messages, such as "reward"."""
    checks: Sequence[Check]
    """In the order in which they run."""
    error: type[ContractError]
    warning: type[ContractWarning]

    def run(self, subject: object) -> list[CheckResult]:
        """Run every check on a subject and return the results."""
        return run_checks(self.checks, subject, self.noun)

    def check(self, subject: object, expected_failures: Mapping[str, str] | None, who: str) -> list[CheckResult]:
        """Return the results, warn of what is odd, or raise `error` with a line for every problem; `who` heads them."""
        results = self.run(subject)
        problems = self._problems(results, expected_failures or {})
        for result in results:
            if result.status == "warning":
                warnings.warn(f"{result.name}: {result.message}", self.warning, stacklevel=3)
        if problems:
            lines = "\n".join(f"- {problem}" for problem in problems)
            cause = next((result.cause for result in results if result.cause is not None), None)
            raise self.error(f"{who}:\n{lines}") from cause
        return results

    def parametrize(self, make: Callable[[], object], expected_failures: Mapping[str, str] | None) -> Any:
        """Return a pytest decorator that runs a test once per check, as its argument `check`; call it: `check()`.

        `make` makes the subject, when the first check runs.
        """
        import pytest  # only authors' tests need it

        expected = expected_failures or {}
        self._check_names(expected)
        cache: dict[str, CheckResult] = {}

        def run(name: str) -> None:
            if not cache:
                cache.update({result.name: result for result in self.run(make())})
            result = cache[name]
            if result.status == "skipped":
                pytest.skip(result.message)
            if result.status == "warning":
                warnings.warn(f"{name}: {result.message}", self.warning, stacklevel=2)
            for problem in self._problems([result], expected):
                raise self.error(problem) from result.cause

        return pytest.mark.parametrize("check", [pytest.param(partial(run, c.name), id=c.name) for c in self.checks])

    def _check_names(self, expected: Mapping[str, str]) -> None:
        """Raise `ValueError` for a check that is expected to fail and does not exist."""
        known = [check.name for check in self.checks]
        for name in expected:
            if name not in known:
                raise ValueError(
                    f"expected_failures names {name!r}, which is no check; the checks are {', '.join(known)}"
                )

    def _problems(self, results: Sequence[CheckResult], expected: Mapping[str, str]) -> list[str]:
        """Return a line for each check that failed, or was expected to and did not."""
        self._check_names(expected)
        problems = [f"{r.name}: {r.message}" for r in results if r.status == "failed" and r.name not in expected]
        problems += [
            f"{r.name}: was expected to fail ({expected[r.name]}), but {r.status}; remove it from expected_failures"
            for r in results
            if r.name in expected and r.status != "failed"
        ]
        return problems


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Turn an exception inside the block into a failure of the check that says what to do."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, RDMError) else described(error)
        raise AssertionError(f"{text.rstrip('. ')}. {advice}") from error


def require(condition: object, message: str) -> None:
    """Raise `AssertionError` unless a condition holds: an assertion that `python -O` does not remove."""
    if not condition:
        raise AssertionError(message)
