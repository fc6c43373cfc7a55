"""GNDMR in the trainer: zero weights change no bit (law 6), adaptive weights act, and each update its own (law 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_runs import pictures
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import ConfigError, RDMTrainer
from rdm_sdk.families.load import load_family
from rdm_sdk.training.weighting import RewardStatistics

Make = Callable[..., RDMTrainer]
Losses = Callable[[RDMTrainer], list[dict[str, float]]]


def jpeg_like(images: Tensor, prompts: list[str], **columns: object) -> Tensor:
    """Score a picture by how little it changes from pixel to pixel, and draw random numbers on the way."""
    torch.randn(3)
    return -(images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))


def student_of(trainer: RDMTrainer) -> list[Tensor]:
    """Return the student's weights."""
    return [p.detach().clone() for p in trainer.parameters_of("student")]


BOLD = {"max_steps": 3, "learning_rate": 2e-3, "critic_learning_rate": 2e-3, "critic_steps": 1}
"""Settings under which a difference would show."""


def trained(make_trainer: Make, folder: Path, rewards: object, prompts: object = None, **settings: Any) -> list[Tensor]:
    """Return the student's weights after three bold steps."""
    trainer = make_trainer(folder, rewards, prompts, **(BOLD | settings))
    before = student_of(trainer)
    trainer.train()
    after = student_of(trainer)
    assert not same(before, after)
    return after


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two students are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- Law 6 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gndm(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Return the student of a plain "dm" run."""
    return trained(make_trainer, tmp_path_factory.mktemp("gndm"), "dm", pictures())


ALL_KINDS = ["0*legibility", (jpeg_like, 0.0), "0*guidance", "0*adversarial", "0*flow"]


@pytest.mark.parametrize("watched", ALL_KINDS, ids=["pixel", "scored", "guidance", "adversarial", "flow"])
def test_a_zero_weight_of_any_kind_changes_nothing(
    make_trainer: Make, tmp_path: Path, gndm: list[Tensor], watched: object
) -> None:
    """A reward of weight 0 is watched, and the student is the same bits as without it."""
    assert same(trained(make_trainer, tmp_path, ["dm", watched], pictures()), gndm)


@pytest.mark.parametrize("weighting", ["fixed", "balance", "constraint"])
def test_gndmr_with_zero_weights_is_gndm(
    make_trainer: Make, tmp_path: Path, gndm: list[Tensor], losses_of: Losses, weighting: str
) -> None:
    """Law 6, all kinds at once, under every strategy; their scores are logged, so they were judged."""
    trainer = make_trainer(tmp_path, ["dm", *ALL_KINDS], pictures(), weighting=weighting, **BOLD)
    trainer.train()
    assert same(student_of(trainer), gndm)
    row = losses_of(trainer)[-1]
    names = ("legibility", "jpeg_like", "guidance", "adversarial", "flow")
    assert all(f"rewards/{name}/mean" in row and row[f"weights/{name}"] == 0 for name in names)
    assert row["adversarial/critic_loss"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0},
        {"gradient_accumulation_steps": 2, "num_iterations": 2},
        {"normalization": "sample", "spread": "free", "critic_correction": "none", "sampler": "cps"},
    ],
    ids=["guided", "reused", "dmd2"],
)
def test_zero_weights_under_other_settings(make_trainer: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The same with guidance and more draws, with reuse and accumulation, and with DMD2's settings."""
    plain = trained(make_trainer, tmp_path, "dm", pictures(), **settings)
    assert same(trained(make_trainer, tmp_path, ["dm", *ALL_KINDS], pictures(), **settings), plain)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["fresh", "reused"])
@pytest.mark.parametrize("reward", ["legibility", jpeg_like], ids=["gradient", "scored"])
def test_dm_at_weight_zero_is_plain_reward_tuning(
    make_trainer: Make, tmp_path: Path, settings: dict[str, Any], reward: object
) -> None:
    """With `dm` at weight 0, its critic trains aside, and the student is the same bits as without `dm`."""
    plain = trained(make_trainer, tmp_path, reward, **settings)
    assert same(trained(make_trainer, tmp_path, ["0*dm", reward], **settings), plain)


def test_a_cold_start_is_gndm_at_first(make_trainer: Make, tmp_path: Path, gndm: list[Tensor]) -> None:
    """While the cold start lasts the student is GNDM's, bit for bit; after it, it is not."""
    cold, warm = ({"weighting": f"fixed[cold_start={steps}]"} for steps in (3, 2))
    assert same(trained(make_trainer, tmp_path, "dm + legibility", pictures(), **cold), gndm)
    assert not same(trained(make_trainer, tmp_path, "dm + legibility", pictures(), **warm), gndm)


def test_a_cold_start_without_dm_stands_still(make_trainer: Make, tmp_path: Path) -> None:
    """With nothing to learn from for now, the student does not move, and the run goes on."""
    trainer = make_trainer(tmp_path, "legibility", critic_steps=0, weighting="fixed[cold_start=2]", max_steps=2)
    before = student_of(trainer)
    trainer.train()
    assert same(student_of(trainer), before)


# ---- Adaptive weights -------------------------------------------------------------------------------------------


class Watching:
    """A strategy of the user's own: doubles the weights and remembers what it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], dict[str, RewardStatistics], int]] = []
        self.loaded: list[dict[str, float]] = []

    def weigh(
        self, targets: Mapping[str, float], statistics: Mapping[str, RewardStatistics], step: int
    ) -> dict[str, float]:
        self.calls.append((dict(targets), dict(statistics), step))
        return {name: (1 + step) * target for name, target in targets.items()}

    def state_dict(self) -> dict[str, float]:
        return {"calls": float(len(self.calls))}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.loaded.append(dict(state))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_weighting_of_ones_own(make_trainer: Make, tmp_path: Path, losses_of: Losses, accumulation: int) -> None:
    """Asked once per optimizer step, in order, about all rewards; its weights act and are logged with its state."""
    own = Watching()
    trainer = make_trainer(
        tmp_path,
        ["dm", "0.5*legibility", (jpeg_like, 0.25)],
        weighting=own,
        max_steps=3,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert [step for _, _, step in own.calls] == [0, 1, 2, 3]
    assert all(targets == {"dm": 1.0, "legibility": 0.5, "jpeg_like": 0.25} for targets, _, _ in own.calls)
    assert own.calls[0][1] == {}
    rows = losses_of(trainer)
    for (_, statistics, step), row in zip(own.calls[1:], rows, strict=True):
        assert statistics.keys() == {"dm", "legibility", "jpeg_like"}
        for name, seen in statistics.items():
            assert seen.pull == pytest.approx(row[f"{name}/pull"], rel=1e-6)
            assert seen.score == pytest.approx(row[f"rewards/{name}/mean"], rel=1e-5)
            assert 1e-4 < seen.pull < 1e4
        assert [row[f"weights/{name}"] for name in statistics] == [step, 0.5 * step, 0.25 * step]
        assert row["weighting/calls"] == step


def test_the_weights_answered_are_the_ones_that_act(make_trainer: Make, tmp_path: Path, gndm: list[Tensor]) -> None:
    """An own strategy that gives everything but `dm` weight 0 makes the run GNDM."""

    class DmAlone(Watching):
        def weigh(self, targets: Mapping[str, float], statistics: Any, step: int) -> dict[str, float]:
            return {name: float(name == "dm") for name in targets}

    assert same(trained(make_trainer, tmp_path, "dm + 0.5*legibility", pictures(), weighting=DmAlone()), gndm)


@pytest.mark.parametrize(
    ("answer", "words"), [({"dm": 1.0}, "missing"), ({"dm": 1, "legibility": float("nan")}, "nan")]
)
def test_a_wrong_answer_stops_before_training(
    make_trainer: Make, tmp_path: Path, answer: dict[str, float], words: str
) -> None:
    """The first question is asked when the trainer is built."""

    class Wrong(Watching):
        def weigh(self, *_: Any) -> dict[str, float]:
            return answer

    with pytest.raises(ConfigError, match=rf"Wrong\.weigh .*{words}"):
        make_trainer(tmp_path, "dm + legibility", weighting=Wrong())


def test_a_state_that_cannot_be_kept_stops_before_training(make_trainer: Make, tmp_path: Path) -> None:
    """The first checkpoint could not be written with it."""

    class Wrong(Watching):
        def state_dict(self) -> Any:
            return {"average": torch.zeros(())}

    with pytest.raises(ConfigError, match=r"Wrong\.state_dict must return numbers by name"):
        make_trainer(tmp_path, "dm + legibility", weighting=Wrong())


@pytest.mark.parametrize("reward", ["legibility", jpeg_like], ids=["gradient", "scored"])
def test_balance_in_a_run(make_trainer: Make, tmp_path: Path, losses_of: Losses, reward: Any) -> None:
    """The logged weight of each step is the share over the ratio of the averages of the pulls before it."""
    trainer = make_trainer(tmp_path, ["dm", (reward, 0.5)], weighting="balance[decay=0.5]", max_steps=5)
    trainer.train()
    rows, name = losses_of(trainer), "legibility" if reward == "legibility" else "jpeg_like"
    assert rows[0][f"weights/{name}"] == 0.0
    dm, own = rows[0]["dm/pull"], rows[0][f"{name}/pull"]
    for before, row in pairwise(rows):
        dm, own = 0.5 * dm + 0.5 * before["dm/pull"], 0.5 * own + 0.5 * before[f"{name}/pull"]
        assert row[f"weights/{name}"] == pytest.approx(min(0.5 * dm / own, 100.0), rel=1e-5)
        assert row["weighting/pull/dm"] == pytest.approx(dm, rel=1e-5)


def test_constraint_in_a_run(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """The cause of each weight is logged: residual, lowest and multiplier; `dm` keeps its own weight."""
    trainer = make_trainer(tmp_path, "0.7*dm + 0.5*legibility", weighting="constraint[decay=0.5,rate=0.4]", max_steps=5)
    trainer.train()
    rows = losses_of(trainer)
    assert rows[0]["weights/legibility"] == 0.5
    for row in rows[1:]:
        multiplier = torch.tensor(row["weighting/log_multiplier"], dtype=torch.float64).exp().item()
        assert row["weights/legibility"] == pytest.approx(0.5 * multiplier, rel=1e-6)
        assert row["weights/dm"] == 0.7
        assert 0 < row["weighting/lowest"] <= row["weighting/residual"]
    weights = [row["weights/legibility"] for row in rows]
    assert all(before != after for before, after in pairwise(weights))  # up with room, down without: never at rest


# ---- Law 7 ------------------------------------------------------------------------------------------------------


class Snapshots(TrainerCallback):
    """Copies all trained parameters at a step's beginning, after the critics' updates and after the student's."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.taken: list[dict[str, list[Tensor]]] = []
        self.gradients: list[dict[str, float]] = []

    def take(self, *_: Any, **__: Any) -> None:
        roles = self.trainer.roles.trainable_roles
        self.taken.append({r: [p.detach().clone() for p in self.trainer.parameters_of(r)] for r in roles})

    on_step_begin = on_optimizer_step = take

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.take()
        for role in self.trainer.roles.trainable_roles:
            gradients = [p.grad for p in self.trainer.parameters_of(role) if p.grad is not None]
            self.gradients.append({role: sum(float(g.abs().sum()) for g in gradients)})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_update_changes_its_own_roles(
    make_trainer: Make, small_teacher: str, tmp_path: Path, accumulation: int
) -> None:
    """Law 7 with a head: critics and student take turns, the teacher's output stays the same bits."""
    watch = Snapshots()
    trainer = make_trainer(
        tmp_path,
        ["dm + 0.5*adversarial + 0.1*guidance", (jpeg_like, 0.1)],
        pictures(),
        gradient_accumulation_steps=accumulation,
        num_iterations=2,
        max_steps=3,
        weight_decay=0.1,
        callbacks=[watch],
    )
    watch.trainer = trainer
    assert trainer.roles.trainable_roles == ("student", "fake", "discriminator")

    def teacher(family: Any) -> Tensor:
        x_t, sigma = torch.ones(2, *family.latent_shape(None, None)), torch.tensor([0.9, 0.3])
        with torch.no_grad():
            return family.denoiser(family.roles, "teacher", family.encode_prompts(["one", "two"]))(x_t, sigma)

    before = teacher(load_family(small_teacher, torch.float32, max_sequence_length=4))
    trainer.train()
    assert torch.equal(teacher(trainer.family), before)
    for start, critics_done, student_done in zip(*[iter(watch.taken)] * 3, strict=True):
        changed = [
            {role for role in one if any(not torch.equal(a, b) for a, b in zip(one[role], two[role], strict=True))}
            for one, two in ((start, critics_done), (critics_done, student_done))
        ]
        assert changed == [{"fake", "discriminator"}, {"student"}]
    for gradient in watch.gradients:
        assert all((size > 0) == (role == "student") for role, size in gradient.items())
    assert len(watch.gradients) == 9
