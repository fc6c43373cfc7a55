"""Which way each reward acts: the routes of all, and of single rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from rdm_sdk import RDMTrainer, RewardError, Scored
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.rewards.routes import routed

Make = Callable[..., RDMTrainer]


def brightness(images: Tensor, prompts: list[str], **columns: object) -> Tensor:
    """A function: scores alone."""
    return images.mean(dim=(1, 2, 3))


def test_which_rewards_tilt() -> None:
    """All but those that train a critic and those with a field of their own, which is in the teacher's terms."""
    rewards = resolve_rewards(["dm + legibility + guidance + adversarial", brightness])
    sent = routed(rewards, "tilt")
    assert [own.label for own in sent if own.tilts] == ["legibility", "brightness"]
    assert all(own.pathwise for own in sent)
    by_its_score = resolve_rewards(Scored(DistributionMatching()))
    assert routed(by_its_score, "tilt") == by_its_score
    assert not any(own.tilts for route in ("gradient", "advantage") for own in routed(rewards, route))


def test_a_reward_can_go_another_way() -> None:
    """Exceptions are named by what logs call a reward; the others take the route that the spec begins with."""
    rewards = resolve_rewards(["dm + legibility + guidance", brightness])
    legibility, guidance, bright = routed(rewards, "tilt[legibility=gradient, guidance=advantage]")[1:]
    assert not legibility.tilts
    assert legibility.has_gradient
    assert not guidance.pathwise
    assert bright.tilts
    legibility, guidance, bright = routed(rewards, "gradient[legibility=advantage,brightness=tilt]")[1:]
    assert not legibility.pathwise
    assert guidance is rewards[2]
    assert bright.tilts
    assert routed(rewards, "gradient[brightness=advantage]")[3] is rewards[3]
    long = replace(rewards[3], label="acme/sharp:v2[radius=3]")
    assert [own.tilts for own in routed([long, rewards[3]], "gradient[acme/sharp:v2[radius=3]=tilt]")] == [True, False]


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("tilt[legibilty=gradient]", r"'legibilty', which is not among .*Did you mean 'legibility'\?.*dm, legibility"),
        ("tilt[dm=gradient]", "'dm' has a critic and its own way"),
        ("tilt[brightness=gradient]", "'brightness' has no gradient; .*'advantage' or 'tilt'"),
        ("gradient[guidance=tilt]", "'guidance' computes its own field"),
    ],
)
def test_exceptions_that_cannot_be(route: str, words: str) -> None:
    """A reward that is not there, or that cannot go where it is sent, is named."""
    with pytest.raises(RewardError, match=words):
        routed(resolve_rewards(["dm + legibility + guidance", brightness]), route)


def test_a_wrong_exception_is_found_before_a_reward_is_loaded(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward models may be large; what a route names is checked on what rewards declare."""

    def loading(_: object) -> None:
        raise AssertionError("the classifier was loaded")

    monkeypatch.setattr("rdm_sdk.digits.reward.Legibility.__init__", loading)
    with pytest.raises(RewardError, match="'legibilty'"):
        make_trainer(tmp_path, "dm + legibility", reward_route="tilt[legibilty=gradient]")
