"""Rollouts used more than once: importance weights, costs, and the states that later uses start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from digit_runs import Bright
from torch import Tensor
from transformers import TrainerCallback
from watched_rewards import BOLD, Judge, WatchedMatching

from rdm_sdk import RDMTrainer

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]


# ---- What reuse saves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_four_uses_make_a_quarter_of_the_rollouts(make_trainer: Make, tmp_path: Path, accumulation: int) -> None:
    """Rollouts, and the questions to scored rewards, fall to a quarter; updates of student and critic do not."""
    steps = 8 // accumulation
    costs, asked = [], []
    for uses in (1, 4):
        judge = Judge()
        trainer = make_trainer(
            tmp_path,
            ["dm", (judge, 0.1)],
            num_iterations=uses,
            max_steps=steps,
            critic_steps=1,
            gradient_accumulation_steps=accumulation,
            min_effective_sample_size=0.0,
        )
        trainer.train()
        costs.append(trainer.costs())
        asked.append(judge.asked)
    fresh, reused = costs
    assert fresh["cost/rollouts"] == 8 * 8
    assert reused["cost/rollouts"] == fresh["cost/rollouts"] / 4
    assert fresh["cost/critic_steps"] == reused["cost/critic_steps"] == steps
    assert len(asked[0]) == 4 * len(asked[1]) == 8
    assert reused["cost/reward_calls"] == 8 * 8 + 8 * 8 / 4  # of dm, and of the scored reward
    assert reused["cost/student_forwards"] < fresh["cost/student_forwards"]
    # Each prompt is asked about once; without reuse, two optimizer steps later it is another's turn.
    prompts = [p for call in asked[1] for p in call[::4]]
    assert len(prompts) == len(set(prompts))


def test_fresh_rollouts_for_every_critic_update(make_trainer: Make, tmp_path: Path) -> None:
    """`critic_rollouts="fresh"`: as DMD2, each critic update draws samples of its own, and none of them is scored."""
    costs, seen = {}, {}
    for source in ("shared", "fresh"):
        reward, judge = WatchedMatching(), Judge()
        samples: list[Tensor] = []
        learn = reward.training_loss
        reward.training_loss = lambda batch, learn=learn, samples=samples: (  # type: ignore[method-assign]
            samples.append(batch.latents) or learn(batch)  # type: ignore[func-returns-value]
        )
        trainer = make_trainer(
            tmp_path, [reward, (judge, 0.1)], critic_rollouts=source, critic_steps=3, max_steps=2, learning_rate=1e-3
        )
        trainer.train()
        costs[source], seen[source] = trainer.costs(), samples
        assert len(judge.asked) == 2
    assert costs["shared"]["cost/rollouts"] == 2 * 8
    assert costs["fresh"]["cost/rollouts"] == 2 * 8 * (1 + 3)
    assert costs["fresh"]["cost/fake_forwards"] == costs["shared"]["cost/fake_forwards"]
    # Shared rollouts show another step's x_0 at each turn (test_matching.py says which); fresh ones are new anyway.
    assert {source: len({own.sum().item() for own in samples}) for source, samples in seen.items()} == {
        "shared": 6,
        "fresh": 6,
    }


def test_rows_whose_prompts_read_the_same_share_no_rollout(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was rolled out anew for one row's last use is not taken for the row after it, whose scores are others."""
    rows = Dataset.from_dict({"prompt": ["a zero"] * 4, "worth": [1.0, 2.0, 3.0, 4.0]})

    def worth(images: Tensor, worth: list[float]) -> list[float]:
        return [value + 0.01 * i for i, value in enumerate(worth)]

    seen: list[tuple[list[float], list[float]]] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            (one,) = trainer.step.rollouts.experiences
            seen.append((one.columns["worth"], one.scored["worth"].scores.tolist()))

    trainer = make_trainer(
        tmp_path,
        ["dm", (worth, 0.1)],
        prompts=rows,
        num_iterations=2,
        max_steps=6,
        min_effective_sample_size=0.5,
        callbacks=[Look()],
        **BOLD,
    )
    shares = iter([0.0, 1.0, 1.0])  # the first rollout is not used twice
    monkeypatch.setattr(trainer.step.rollouts, "_effective_share", lambda ratio: next(shares))
    trainer.train()
    assert len(seen) == 6
    assert trainer.costs()["cost/rollouts"] == 4 * 8
    for columns, scores in seen:
        assert [int(score) for score in scores] == [int(value) for value in columns]


# ---- Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["renoise", "cps", "sde"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_first_use_has_ratio_one_and_later_uses_their_weights(
    make_trainer: Make,
    tmp_path: Path,
    policy_calls: list[tuple[Tensor, Tensor]],
    state_ratios: list[Tensor],
    sampler: str,
    reduction: str,
) -> None:
    """Law 4: weights and policy ratios of a first use are exactly 1, of later ones min(ratio, cap) of the states."""
    reward, cap = WatchedMatching(), 1.02
    settings = {"sampler": sampler, "ratio_reduction": reduction, "importance_sampling_cap": cap}
    trainer = make_trainer(
        tmp_path,
        [reward, (Judge(), 0.3)],
        num_iterations=3,
        max_steps=4,
        eta=0.7,
        min_effective_sample_size=0.0,
        **settings,
        **BOLD,
    )
    trainer.train()
    assert len(policy_calls) == len(reward.judged) == 4
    assert len(state_ratios) == 2
    for use, (log_ratios, weights) in zip((0, 1, 2, 0), policy_calls, strict=True):
        assert torch.equal(log_ratios, torch.zeros_like(log_ratios)) == (use == 0)
        assert len(log_ratios) == len(weights) == 6  # two of eight samples are at the last step
        assert torch.equal(weights, torch.ones(6)) == (use == 0)
    for use, weights, (_, acting) in zip((0, 1, 2, 0), reward.judged, policy_calls, strict=True):
        assert set(acting.tolist()) <= set(weights.tolist())
        if use == 0:
            assert torch.equal(weights, torch.ones(8))
        else:
            ratio = state_ratios[use - 1]
            torch.testing.assert_close(weights, ratio.exp().clamp(max=cap))
            assert (ratio == 0).sum() >= 2  # no transition has led to a first state
            assert ratio.abs().max() > (1e-2 if reduction == "sum" else 1e-5)
    assert (torch.cat(state_ratios).exp() > cap).any() or reduction == "mean"


def test_both_reductions_pull_alike_at_first(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """At ratio 1 summed and averaged densities give the same gradient, and the same pull to weigh by."""
    rows = []
    for reduction in ("sum", "mean"):
        trainer = make_trainer(tmp_path, Judge(), ratio_reduction=reduction, max_steps=1, critic_steps=0)
        trainer.train()
        (row,) = losses_of(trainer)
        (pull,) = (value for name, value in row.items() if name.endswith("/pull"))
        rows.append((pull, row["grad_norm"]))
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    assert rows[0][0] > 0 < rows[0][1]


def test_scores_alone_train_no_step_without_a_density(
    make_trainer: Make, tmp_path: Path, policy_calls: list[tuple[Tensor, Tensor]]
) -> None:
    """The last step of a trajectory has no ratio, so where only scores teach no sample is spent on it, in no use."""
    settings = {"num_iterations": 3, "min_effective_sample_size": 0.0}
    trainer = make_trainer(tmp_path, Judge(), critic_steps=0, max_steps=3, **settings)
    trainer.train()
    assert [len(weights) for _, weights in policy_calls] == [8, 8, 8]
    (experience,) = trainer.step.rollouts.experiences
    assert experience.plan.sort(0).values.T.tolist() == [[0, 1, 2]] * 8  # of the four steps


def test_weights_are_of_the_states_of_this_use(make_trainer: Make, tmp_path: Path) -> None:
    """Whoever is at the first state in the second use has had no transition; all others have, to where they are now."""
    settings = {"num_iterations": 2, "max_steps": 2, "importance_sampling_cap": 1e9, "min_effective_sample_size": 0.0}
    trainer = make_trainer(tmp_path, [WatchedMatching(), (Judge(), 0.3)], **settings, **BOLD)
    trainer.train()
    (experience,) = trainer.step.rollouts.experiences
    assert experience.use == 1
    assert torch.equal(experience.weights == 1, experience.steps == 0)


def test_a_replay_that_is_off_by_bits_has_ratio_one(
    make_trainer: Make, tmp_path: Path, policy_calls: list[tuple[Tensor, Tensor]]
) -> None:
    """Another batch may round otherwise; the replay's prediction takes the place of the rollout's."""
    trainer = make_trainer(tmp_path, Judge(), critic_steps=0, max_steps=1)
    plain, made = trainer.models.denoiser, []

    def denoiser(role: str, *args: Any) -> Any:
        inner = plain(role, *args)
        made.append(role)
        off = 1e-5 * len(made)
        return lambda x_t, sigma: inner(x_t, sigma) + off

    trainer.models.denoiser = denoiser
    trainer.train()
    assert made.count("student") > 1
    ((log_ratios, _),) = policy_calls
    assert log_ratios.tolist() == [0.0] * 8


def test_critics_learn_with_the_same_weights(make_trainer: Make, tmp_path: Path) -> None:
    """Critic and student see the same samples with the same weights in every update."""
    reward = WatchedMatching()
    trainer = make_trainer(
        tmp_path, reward, num_iterations=3, max_steps=3, **(BOLD | {"critic_steps": 2}), min_effective_sample_size=0.0
    )
    trainer.train()
    assert len(reward.judged) == 3
    for use, weights in enumerate(reward.judged):
        assert all(torch.equal(weights, own) for own in reward.trained[2 * use : 2 * use + 2])
        assert bool((weights == 1).all()) == (use == 0)


def test_without_the_correction_all_weights_are_one(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, state_ratios: list[Tensor]
) -> None:
    """`importance_sampling_correction=False`: reuse as if nothing had changed; nothing is evaluated for weights."""
    reward = WatchedMatching()
    trainer = make_trainer(
        tmp_path, reward, num_iterations=3, max_steps=3, importance_sampling_correction=False, **BOLD
    )
    trainer.train()
    assert all(torch.equal(weights, torch.ones(8)) for weights in reward.judged + reward.trained)
    assert state_ratios == []
    assert not any("ratio/ess" in row for row in losses_of(trainer))
    assert trainer.costs()["cost/rollouts"] == 8


def test_the_weights_act_on_the_students_loss(make_trainer: Make, tmp_path: Path) -> None:
    """With and without the correction the first update is the same, and the second is not."""
    students = []
    for steps in (1, 2):
        for correct in (True, False):
            settings = {"importance_sampling_correction": correct, "max_steps": steps, "critic_steps": 0}
            settings |= {"num_iterations": 2, "learning_rate": 2e-2, "min_effective_sample_size": 0.0}
            trainer = make_trainer(tmp_path, Bright(), **settings)
            trainer.train()
            students.append([p.detach().clone() for p in trainer.parameters_of("student")])
    one, plain_one, two, plain_two = students
    assert all(torch.equal(a, b) for a, b in zip(one, plain_one, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(two, plain_two, strict=True))


# ---- States that later uses start from --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gradients", "scores", "fresh"])
def test_later_uses_start_from_states_of_the_latest_student(make_trainer: Make, tmp_path: Path, case: str) -> None:
    """A later use's prediction leads to the next use's state, unless a score hangs on how the trajectory ended.

    Where the critics have fresh rollouts, so does the first use's: the rollout went no further than to its state.
    """
    scored = case == "scores"
    settings: dict[str, Any] = {"num_iterations": 4, "max_steps": 4, "min_effective_sample_size": 0.0, **BOLD}
    settings["critic_rollouts"] = "fresh" if case == "fresh" else "shared"
    trainer = make_trainer(tmp_path, ["dm", (Judge(), 0.1)] if scored else "dm", **settings)
    seen: list[tuple[Any, Tensor, Tensor]] = []  # rollout, states and predictions of a use
    plain = trainer.judge.judge

    def watching(experience: Any) -> Any:
        done = experience.rollout
        seen.append((experience, done.states.clone(), experience.x_0.clone()))
        return plain(experience)

    trainer.judge.judge = watching  # type: ignore[method-assign]
    trainer.train()
    assert [own.use for own, _, _ in seen] == [0, 1, 2, 3]
    first, states, x_0 = seen[0]
    for i, k in enumerate(first.steps.tolist()):
        assert torch.equal(first.rollout.x_0[k, i], x_0[i])
        assert bool((states[: k + 2, i].flatten(1) != 0).any(1).all())
    for (own, states, x_0), (_, before, _) in zip(seen[1:], seen, strict=False):
        for i, k in enumerate(own.steps.tolist()):
            if scored:
                assert torch.equal(states[:, i], before[:, i])
            elif k < 3:
                assert not torch.equal(states[k + 1, i], before[k + 1, i])
                assert torch.equal(own.rollout.x_0[k, i], x_0[i])
                others = [j for j in range(4) if j != k + 1]
                assert torch.equal(states[others, i], before[others, i])


def test_a_rollout_goes_only_as_far_as_its_first_use(make_trainer: Make, tmp_path: Path) -> None:
    """What later uses need is drawn on the way, so reuse without scores adds no depth to rollouts.

    Unless critics learn from all that the student predicts along them: then they go to the end.
    """
    forwards = {}
    for source in ("fresh", "shared"):
        costs = []
        for uses in (1, 4):
            trainer = make_trainer(
                tmp_path,
                num_iterations=uses,
                max_steps=1,
                critic_steps=1,
                critic_rollouts=source,
                spread="stratified",
                num_generations=4,
            )
            trainer.train()
            costs.append(trainer.costs())
        assert costs[0] == costs[1]
        forwards[source] = costs[0]["cost/student_forwards"] - 8  # without the update's predictions
    # Two groups of four: the critics' rollouts up to an x_0 of each step, the student's up to the state before it.
    assert forwards == {"fresh": 2 * (1 + 2 + 3 + 4) + 2 * (0 + 1 + 2 + 3), "shared": 8 * 4}
