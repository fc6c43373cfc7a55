"""`Scored`: a reward with a gradient, used as if it had none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, RewardError, digits
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.guidance import Guidance
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.rewards.routes import routed
from rdm_sdk.rewards.scored import Scored

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]


def digits_batch() -> RewardBatch:
    """Return eight real digits with their prompts."""
    prompts = [digits.prompts()[label] for label in digits.heldout_labels()[:8].tolist()]
    return RewardBatch.from_images(digits.heldout_images()[:8] * 0.9, prompts, 2)


def test_it_scores_as_what_it_wraps_and_has_no_gradient() -> None:
    """The same scores, name and provenance; everything declared but the gradient."""
    plain, scored = Legibility(), Scored(Legibility())
    one, other = evaluate_reward(plain, digits_batch()), evaluate_reward(scored, digits_batch())
    assert torch.equal(one.scores, other.scores)
    assert one.gradient is not None
    assert other.gradient is other.magnitude is None
    assert scored.name == plain.name == "legibility"
    assert scored.provenance() == plain.provenance()
    assert (scored.capabilities.gradient, scored.capabilities.prompts) == ("none", True)
    assert not scored.capabilities.needs_models
    assert Scored(Guidance()).capabilities.needs_models
    assert Scored(DistributionMatching()).capabilities.trains == "fake"


def test_it_wraps_rewards_only() -> None:
    """A class, a name or a function is not a reward object."""
    for wrong in (Legibility, "legibility", len):
        with pytest.raises(RewardError, match="Scored wraps a Reward object"):
            Scored(wrong)  # type: ignore[arg-type]


def test_the_route_takes_external_rewards_only() -> None:
    """ "advantage" wraps what has a gradient and trains nothing; the rest stays as it is."""

    def plain(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    rewards = resolve_rewards(["dm + legibility + guidance + adversarial", plain])
    assert routed(rewards, "gradient") == rewards
    kinds = {own.label: type(own.reward).__name__ for own in routed(rewards, "advantage")}
    assert kinds["legibility"] == kinds["guidance"] == "Scored"
    assert kinds["dm"] == "DistributionMatching"
    assert kinds["adversarial"] == "Adversarial"
    assert kinds["plain"] != "Scored"
    assert [own.weight for own in routed(rewards, "advantage")] == [own.weight for own in rewards]


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


def test_it_acts_by_advantages(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """`reward_route="advantage"` and `Scored` are the same run, bit for bit, and use the policy loss alone."""
    runs = []
    for rewards, settings in (((Bright(), 0.5), {"reward_route": "advantage"}), ((Scored(Bright()), 0.5), {})):
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
    """The wrapped reward is scored without gradients, on finished samples, once per rollout."""
    reward = Bright()
    make_trainer(tmp_path, ["dm", Scored(reward)]).train()
    assert reward.tracked == [False, False]


@pytest.mark.parametrize("weighting", ["fixed", "balance"])
def test_distribution_matching_by_its_score(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, weighting: str
) -> None:
    """`Scored(dm)` trains its critic, and its advantages move the student: the score-function estimator."""
    trainer = make_trainer(
        tmp_path, [Scored(DistributionMatching()), "0.5*legibility"], num_draws=2, weighting=weighting, max_steps=3
    )
    assert trainer.roles.trainable_roles == ("student", "fake")
    before = [p.detach().clone() for p in trainer.parameters_of("fake")]
    trainer.train()
    row = losses_of(trainer)[-1]
    assert {"loss/policy", "loss/pathwise", "loss/dm", "rewards/dm/mean"} <= row.keys()
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
