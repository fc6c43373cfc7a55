"""The contract kit: sound rewards pass, and for each check a planted mistake fails that check alone."""

from __future__ import annotations

import importlib
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import odd_rewards
import pytest
import torch
from broken_rewards import BROKEN, DeafToPrompts, OtherUnitsDownhill, Sound, WrongShape
from odd_rewards import Watched

from rdm_sdk import Capabilities, RewardBatch, RewardError
from rdm_sdk.testing import (
    CHECKS,
    RewardCheckError,
    RewardCheckWarning,
    check_reward,
    example_images,
    parametrize_reward_checks,
    run_reward_checks,
)


@pytest.mark.parametrize("name", BROKEN)
def test_each_mistake_fails_its_check_alone(name):
    """A planted mistake is found by the check it was planted for, and by no other."""
    failed = [result.name for result in run_reward_checks(BROKEN[name]()) if result.status == "failed"]
    assert failed == [name]


def test_a_sign_is_told_whatever_the_units():
    """Scores that come with the gradient in other units do not hide that it points downhill."""
    failed = [result.name for result in run_reward_checks(OtherUnitsDownhill()) if result.status == "failed"]
    assert failed == ["gradient_keeps_scores", "ascent_raises_score"]


@pytest.mark.parametrize(
    ("draw", "library"),
    [(lambda: np.random.seed(5), "NumPy"), (lambda: random.seed(5), "Python")],  # noqa: NPY002 - the global one is meant
)
def test_every_random_state_is_watched(draw, library):
    """Not torch's alone, and though a seed that every call sets leaves the state that the call before has left."""

    class Drawing(Sound):
        def score(self, batch: RewardBatch) -> torch.Tensor:
            draw()
            return super().score(batch)

    (failed,) = [result for result in run_reward_checks(Drawing()) if result.status == "failed"]
    assert failed.name == "rng_untouched"
    assert library in failed.message


def test_every_check_has_its_mistake():
    """No check without a reward that fails it."""
    elsewhere = {"imports_without_cuda", "torch_settings_untouched"}
    assert {check.name for check in CHECKS} == BROKEN.keys() | elsewhere


def test_a_deaf_reward_is_a_warning():
    """A reward that ignores the prompts it declares passes, with a warning that says so."""
    with pytest.warns(RewardCheckWarning, match="do not change with the prompts"):
        results = check_reward(DeafToPrompts())
    assert [result.name for result in results if result.status == "warning"] == ["follows_the_prompt"]


def test_waking_cuda_at_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that initializes CUDA when it is imported fails that check alone."""
    (tmp_path / "wakes_cuda.py").write_text(
        "import torch\nfrom broken_rewards import Sound\n"
        "try:\n    torch.cuda.init()\nexcept AssertionError:\n    pass\n"
        "class Waking(Sound):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("wakes_cuda")
    failed = [result for result in run_reward_checks(module.Waking()) if result.status == "failed"]
    assert [result.name for result in failed] == ["imports_without_cuda"]
    assert "CUDA was initialized at import" in failed[0].message
    del sys.modules["wakes_cuda"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("set_grad_enabled(False)", "gradients were turned off at import"),
        ("set_default_dtype(torch.float64)", "the default dtype was set to torch.float64 at import"),
    ],
)
def test_settings_of_torch_at_import_fail(
    setting: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """A module that changes them for the whole program when it is imported fails that check, and says how."""
    name = f"sets_torch_{request.node.callspec.indices['setting']}"
    (tmp_path / f"{name}.py").write_text(f"import torch\ntorch.{setting}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Sound, "__module__", name)
    failed = [result for result in run_reward_checks(Sound()) if result.status == "failed"]
    assert [result.name for result in failed] == ["imports_without_cuda"]
    assert words in failed[0].message


def test_settings_of_torch_in_a_call_fail():
    """So does one that changes them when it is called, from its first call on."""

    class Doubling(Sound):
        def score(self, batch):
            torch.set_default_dtype(torch.float64)
            return super().score(batch)

    before = torch.get_default_dtype()
    try:
        failed = [result for result in run_reward_checks(Doubling()) if result.status == "failed"]
    finally:
        torch.set_default_dtype(before)
    assert [result.name for result in failed] == ["torch_settings_untouched"]
    assert "default dtype torch.float64 and gradients on" in failed[0].message


@pytest.mark.parametrize("reward", ["dm", "legibility", "adversarial", "flow"])
def test_built_in_rewards_pass(reward):
    """The SDK's own rewards keep the contract."""
    results = check_reward(reward)
    assert {result.status for result in results} <= {"passed", "skipped"}
    assert sum(result.status == "passed" for result in results) >= 10


def test_a_plain_function_passes():
    """A callable is checked like a class."""

    def ink(images, prompts, **columns):
        return (1 - images.mean(dim=(1, 2, 3))).tolist()

    assert {result.status for result in check_reward(ink)} <= {"passed", "skipped"}


@pytest.mark.parametrize("name", ["Watched", "WrongShape"])
def test_a_named_reward_is_made_once(monkeypatch, name):
    """Its models are loaded for the checks, and not again for a message."""
    monkeypatch.setattr(odd_rewards, "WrongShape", type("WrongShape", (Watched,), {"score": WrongShape.score}), False)
    before = Watched.made
    with nullcontext() if name == "Watched" else pytest.raises(RewardCheckError, match=f"^'{name}' does not keep"):
        check_reward(f"odd_rewards:{name}")
    assert Watched.made == before + 1


def test_the_message_tells_what_to_do():
    """The error names the reward, the check, what was found and the remedy."""
    with pytest.raises(RewardCheckError, match=r"'wrongshape'.*\n- returns_scores: .*\[8, 3\].*one score per sample"):
        check_reward(BROKEN["returns_scores"]())


def test_expected_failures():
    """A known failure is accepted, must really fail, and must be spelt right."""
    check_reward(BROKEN["chunk_invariant"](), expected_failures={"chunk_invariant": "compares on purpose"})
    with pytest.raises(RewardCheckError, match=r"chunk_invariant: was expected to fail .on purpose., but passed"):
        check_reward(Sound(), expected_failures={"chunk_invariant": "on purpose"})
    with pytest.raises(ValueError, match="'chunks', which is no check"):
        check_reward(Sound(), expected_failures={"chunks": "on purpose"})


def test_an_exception_is_a_failed_check():
    """A reward that raises is reported once, with its exception, its place, and its traceback as the cause."""

    class Raising(Sound):
        def score(self, batch):
            raise KeyError("aspect")

    (failed,) = [result for result in run_reward_checks(Raising()) if result.status == "failed"]
    assert "KeyError: 'aspect' (test_check_reward.py, line " in failed.message
    with pytest.raises(RewardCheckError) as caught:
        check_reward(Raising())
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_with_columns_must_bring_its_example():
    """The kit cannot make up a stranger's columns."""

    class Captioned(Sound):
        capabilities = Capabilities(columns=("caption",))

    with pytest.raises(RewardError, match=r"needs the columns caption: write example\(self\)"):
        check_reward(Captioned())


@pytest.mark.parametrize(("count", "group"), [(1, 1), (4, 1), (4, 4)])
def test_an_example_that_shows_too_little_is_refused(count: int, group: int):
    """Of one image, or one group, chunks and shuffled batches are what they were."""

    class Exemplary(BROKEN["chunk_invariant"]):
        def example(self):
            return RewardBatch.from_images(example_images(count), ["a cat"] * count, group)

    with pytest.raises(RewardError, match=rf"'exemplary' .* got {count} in groups of {group}. Let example\(\)"):
        check_reward(Exemplary())


def test_a_reward_defined_in_a_script(monkeypatch):
    """What cannot be imported afresh is not held against it."""
    monkeypatch.setattr(Sound, "__module__", "__main__")
    results = {result.name: result for result in check_reward(Sound())}
    assert results["imports_without_cuda"].status == "skipped"


@parametrize_reward_checks(Sound)
def test_parametrized(check):
    """The pytest decorator runs every check as a test of its own."""
    check()


def test_the_decorator_fails_what_check_reward_fails():
    """A failing check raises in its own test."""
    mark = parametrize_reward_checks(BROKEN["ascent_raises_score"]).mark
    by_name = {parameter.id: parameter.values[0] for parameter in mark.args[1]}
    by_name["odd_sizes"]()
    with pytest.raises(RewardCheckError, match="ascent_raises_score"):
        by_name["ascent_raises_score"]()


def test_the_kit_leaves_the_random_state_alone():
    """Running the kit in a test does not change what the test draws afterwards."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_reward(Sound())
    assert torch.equal(torch.rand(1), expected)
