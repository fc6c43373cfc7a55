"""Which way each reward acts: the routes of all, and of single rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk import Capabilities, CheckpointError, RDMTrainer, Reward, RewardBatch, RewardError
from rdm_sdk.plugins.registry import registry
from rdm_sdk.rewards.resolve import plan_rewards, resolve_rewards
from rdm_sdk.rewards.routes import choose_routes

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]


def brightness(images: Tensor, prompts: list[str], **columns: object) -> Tensor:
    """A function: scores alone."""
    return images.mean(dim=(1, 2, 3))


class Bright(Reward):
    """A differentiable pixel reward that notes whether it was to be differentiated."""

    name = "bright"
    capabilities = Capabilities(gradient="autograd")

    def __init__(self) -> None:
        super().__init__()
        self.tracked: list[bool] = []

    def score(self, batch: RewardBatch) -> Tensor:
        self.tracked.append(batch.images.requires_grad or torch.is_grad_enabled())
        return batch.images.mean(dim=(1, 2, 3))


class Unsteady(Reward):
    """A reward that takes back what its class declares."""

    name = "unsteady"
    capabilities = Capabilities(gradient="autograd")

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(1, 2, 3))


# ---- Which is chosen ------------------------------------------------------------------------------------------------

ALL: list[Any] = ["dm + legibility + guidance + adversarial", brightness]


def routes_of(rewards: Any, route: str) -> dict[str, str]:
    """Return the route of each reward."""
    return {reward.label: reward.route for reward in resolve_rewards(rewards, None, route)}


def test_the_route_of_all() -> None:
    """Those that train a critic go by their gradients, always; the others as told, or by what they have."""
    critics = {"dm": "gradient", "adversarial": "gradient"}
    assert routes_of(ALL, "gradient") == critics | {
        "legibility": "gradient",
        "guidance": "gradient",
        "brightness": "advantage",
    }
    assert routes_of(ALL, "advantage") == critics | dict.fromkeys(("legibility", "guidance", "brightness"), "advantage")
    # A reward with a field of its own is in the teacher's terms already.
    assert routes_of(ALL, "tilt") == critics | {"legibility": "tilt", "guidance": "gradient", "brightness": "tilt"}


def test_a_reward_can_go_another_way() -> None:
    """Exceptions are named by what logs call a reward; the others take the route that the spec begins with."""
    rewards = ["dm + legibility + guidance", brightness]
    assert routes_of(rewards, "tilt[legibility=gradient, guidance=advantage]") == {
        "dm": "gradient",
        "legibility": "gradient",
        "guidance": "advantage",
        "brightness": "tilt",
    }
    assert routes_of(rewards, "gradient[legibility=advantage,brightness=tilt]") == {
        "dm": "gradient",
        "legibility": "advantage",
        "guidance": "gradient",
        "brightness": "tilt",
    }
    assert routes_of("dm", "tilt[dm=advantage]") == {"dm": "advantage"}
    declared = {"acme/sharp:v2[radius=3]": Capabilities(), "brightness": Capabilities()}
    assert choose_routes(declared, "gradient[acme/sharp:v2[radius=3]=tilt]") == {
        "acme/sharp:v2[radius=3]": "tilt",
        "brightness": "advantage",
    }


def test_a_route_changes_nothing_else() -> None:
    """The same rewards, with their weights, whatever the route; only on the first two is a gradient asked for."""
    plain, scored = (resolve_rewards("dm + 0.5*legibility", None, route) for route in ("gradient", "advantage"))
    for one, other in zip(plain, scored, strict=True):
        assert (one.term, one.capabilities, one.config) == (other.term, other.capabilities, other.config)
        assert one.reward.provenance() == other.reward.provenance()
    assert [reward.differentiated for reward in plain + scored] == [True, True, True, False]


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("tilt[legibilty=gradient]", r"'legibilty', which is not among .*Did you mean 'legibility'\?.*dm, legibility"),
        ("gradient[dm=tilt]", "'dm' has a critic and its own way"),
        ("tilt[brightness=gradient]", "'brightness' has no gradient; .*'advantage' or 'tilt'"),
        ("gradient[guidance=tilt]", "'guidance' computes its own field"),
    ],
)
def test_exceptions_that_cannot_be(route: str, words: str) -> None:
    """A reward that is not there, or that cannot go where it is sent, is named."""
    with pytest.raises(RewardError, match=words):
        resolve_rewards(["dm + legibility + guidance", brightness], None, route)


def test_a_wrong_exception_is_found_before_a_reward_is_loaded(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward models may be large; what a route names is checked on what rewards declare."""

    def loading(_: object) -> None:
        raise AssertionError("the classifier was loaded")

    monkeypatch.setattr("rdm_sdk.digits.reward.Legibility.__init__", loading)
    with pytest.raises(RewardError, match="'legibilty'"):
        make_trainer(tmp_path, "dm + legibility", reward_route="tilt[legibilty=gradient]")


def test_a_class_declares_what_decides_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward by its name must not turn out to have no gradient once it is made; an object is what it is."""
    assert routes_of(Unsteady(), "gradient") == {"unsteady": "advantage"}
    monkeypatch.setattr(type(registry()), "load", lambda _, name: Unsteady)
    (planned,) = plan_rewards("legibility")
    with pytest.raises(RewardError, match="declares gradient='autograd' as a class and gradient='none'"):
        planned.make()


# ---- By advantages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["advantage", "gradient[bright=advantage]"])
def test_it_acts_by_advantages(make_trainer: Make, tmp_path: Path, losses_of: Losses, route: str) -> None:
    """A reward with a gradient is the run of a function with the same scores, bit for bit: policy loss alone."""

    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    runs = []
    for rewards, settings in (((Bright(), 0.5), {"reward_route": route}), ((bright, 0.5), {})):
        trainer = make_trainer(tmp_path, [rewards], critic_steps=0, learning_rate=1e-3, **settings)
        trainer.train()
        row = losses_of(trainer)[0]
        assert row["grad_norm"] > 0
        assert row["bright/pull"] > 0
        assert "loss/policy" in row
        assert "loss/pathwise" not in row
        runs.append([p.detach().clone() for p in trainer.parameters_of("student")])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_graph_is_built(make_trainer: Make, tmp_path: Path) -> None:
    """The reward is scored without gradients, on finished samples, once per rollout."""
    reward = Bright()
    make_trainer(tmp_path, ["dm", reward], reward_route="advantage").train()
    assert reward.tracked == [False, False]


@pytest.mark.parametrize("weighting", ["fixed", "balance"])
def test_distribution_matching_by_its_score(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, weighting: str
) -> None:
    """`dm=advantage` trains its critic, and its advantages move the student: the score-function estimator."""
    route = "gradient[dm=advantage]"
    trainer = make_trainer(tmp_path, "dm + 0.5*legibility", reward_route=route, weighting=weighting, max_steps=3)
    assert trainer.roles.trainable_roles == ("student", "fake")
    before = [p.detach().clone() for p in trainer.parameters_of("fake")]
    trainer.train()
    row = losses_of(trainer)[-1]
    assert {"loss/policy", "loss/pathwise", "dm/critic_loss", "rewards/dm/mean"} <= row.keys()
    assert row["dm/pull"] > 0
    assert row["weights/legibility"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters_of("fake"), strict=True))


def test_guidance_by_its_score(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """A reward that reads the run's models can go this way too."""
    trainer = make_trainer(tmp_path, "dm + 0.5*guidance", reward_route="advantage")
    trainer.train()
    row = losses_of(trainer)[-1]
    assert row["loss/policy"] == row["loss/policy"]
    assert row["guidance/pull"] > 0


# ---- In a checkpoint ------------------------------------------------------------------------------------------------


def test_no_run_goes_on_by_another_route(make_trainer: Make, tmp_path: Path) -> None:
    """A checkpoint keeps each reward's route by name."""
    make_trainer(tmp_path, "dm + legibility", max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = str(tmp_path / "checkpoint-1")
    make_trainer(tmp_path, "dm + legibility", max_steps=2).train(resume_from_checkpoint=folder)
    other = make_trainer(tmp_path, "dm + legibility", reward_route="gradient[legibility=advantage]", max_steps=2)
    with pytest.raises(CheckpointError, match=r"\['gradient', 'gradient'\]; this run .*\['gradient', 'advantage'\]"):
        other.train(resume_from_checkpoint=folder)
