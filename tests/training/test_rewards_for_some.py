"""Runs that mix prompts which a reward is for with others: it learns from its own, and figures are over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rdm_sdk import Capabilities, DataError, RDMError, RDMTrainer, Reward, RewardBatch, RewardError, digits
from rdm_sdk.method.objective import normalize, policy_pull
from rdm_sdk.rewards.context import Renoised
from rdm_sdk.training.monitor import Monitor, mean_where
from rdm_sdk.training.processes import Processes
from rdm_sdk.types import RewardOutput

Make = Callable[..., RDMTrainer]
NAN = torch.nan
PROMPTS = digits.prompts()


def mixed(every: int = 2) -> Dataset:
    """The digits' prompts, of which each `every`-th has a text."""
    texts = [prompt.upper() if row % every == 0 else None for row, prompt in enumerate(PROMPTS)]
    return Dataset.from_dict({"prompt": PROMPTS, "text": texts})


class Written(Reward):
    """A reward like `ocr`: for samples that have a text; takes down what it was shown and what it returned."""

    capabilities = Capabilities(columns=("text",), range=(0.0, 1.0))

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def score(self, batch: RewardBatch) -> Tensor:
        texts = zip(batch.prompts, batch.columns["text"], strict=True)
        assert all(text == prompt.upper() for prompt, text in texts)
        scores = batch.images.mean(dim=(1, 2, 3))
        self.scores.append(scores.detach())
        return scores


class Bright(Written):
    """The same with a gradient."""

    capabilities = Capabilities(columns=("text",), gradient="autograd")


class Never(Reward):
    """Returns NaN for all it is shown, without having said that it is for nothing."""

    capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.full((len(batch),), NAN)


def rows_of(trainer: RDMTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("make", "weight", "route"),
    [(Written, 0.5, "gradient"), (Bright, 0.5, "gradient"), (Bright, 0.5, "tilt"), (Written, 0, "gradient")],
    ids=["advantage", "gradient", "tilt", "watched"],
)
def test_a_mixed_run(make_trainer: Make, tmp_path: Path, make: Any, weight: float, route: str) -> None:
    """Batches without its prompts are no error; what is logged counts them and averages over the others."""
    reward = make()
    # A prompt a step, of which each third has a text: batches are with it or without.
    trainer = make_trainer(
        tmp_path, ["dm", (reward, weight)], mixed(3), per_device_train_batch_size=4, max_steps=10, reward_route=route
    )
    trainer.train()
    rows, name = rows_of(trainer), f"rewards/{reward.name}"
    assert [row[f"{name}/applies"] for row in rows].count(1.0) == 4
    assert [row[f"{name}/applies"] for row in rows].count(0.0) == 6
    assert len(reward.scores) == 4
    means = iter(reward.scores)
    for row in rows:
        shown = row[f"{name}/applies"] == 1
        assert row[f"{name}/nan"] == (0 if shown else 4)
        for figure in ("mean", "std", "zero_std"):
            assert (f"{name}/{figure}" in row) == shown
        assert (f"{reward.name}/pull" in row) == (shown and weight != 0)
        if shown:
            assert row[f"{name}/mean"] == pytest.approx(float(next(means).mean()), rel=1e-5)
    assert rows[-1]["cost/reward_calls"] == 10 * 4 + 4 * 4


def test_means_are_over_its_samples(make_trainer: Make, tmp_path: Path) -> None:
    """Micro-batches with few of its samples count less, and those without not at all."""
    reward = Written()
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 5, "max_steps": 1}
    trainer = make_trainer(tmp_path, ["dm", (reward, 0.5)], mixed(3), **settings)
    trainer.train()
    (row,), every = rows_of(trainer), torch.cat(reward.scores)
    assert len(every) == 16
    assert row["rewards/written/mean"] == pytest.approx(float(every.mean()), rel=1e-5)
    assert row["rewards/written/applies"] == pytest.approx(16 / 40)


def test_without_another_reward(make_trainer: Make, tmp_path: Path) -> None:
    """A batch that no reward is for teaches nothing, and the run goes on, with rollouts that are used again too."""
    reward = Written()
    settings = {"per_device_train_batch_size": 4, "max_steps": 12, "num_iterations": 2}
    trainer = make_trainer(tmp_path, [reward], mixed(2), **settings)
    trainer.train()
    losses = {row["rewards/written/applies"]: row["loss"] for row in rows_of(trainer)}
    assert losses[0.0] == 0
    assert set(losses) == {0.0, 1.0}
    assert any("loss/policy" in row for row in rows_of(trainer))


def test_watching_stops_no_run(make_trainer: Make, tmp_path: Path) -> None:
    """NaN for all it was shown is an error of a reward that trains, and none of one that is watched."""
    make_trainer(tmp_path / "a", ["dm", (Never(), 0)]).train()
    with pytest.raises(RewardError, match=r"'never' returned NaN .not applicable. for every sample"):
        make_trainer(tmp_path / "b", ["dm", (Never(), 0.1)]).train()


@pytest.mark.usefixtures("no_training")
def test_a_reward_for_no_prompt_at_all(make_trainer: Make, tmp_path: Path) -> None:
    """It is found before the base is loaded; a watched one may be for the evaluation prompts alone."""
    plain = Dataset.from_dict({"prompt": PROMPTS, "text": [None] * 10})
    words = r"'written' is for none of the prompts of train_dataset .it is for rows that have: text.*Add prompts"
    with pytest.raises(DataError, match=words):
        make_trainer(tmp_path, ["dm", Written()], plain, eval_dataset=mixed(), model="no/such/model")
    with pytest.raises(DataError, match="none of the prompts of train_dataset and eval_dataset"):
        make_trainer(tmp_path, ["dm", (Written(), 0)], plain, eval_dataset=plain, model="no/such/model")
    make_trainer(tmp_path, ["dm", (Written(), 0)], plain, eval_dataset=mixed())


def test_evaluation(make_trainer: Make, tmp_path: Path) -> None:
    """Means are over the prompts that a reward is for; without any, it is left out, and nothing at all is an error."""
    reward = Written()
    trainer = make_trainer(tmp_path, ["dm", (reward, 0.5), "0*jpeg"], mixed(), eval_dataset=mixed(3))
    results = trainer.evaluate()
    assert results["eval_rewards/written/mean"] == pytest.approx(float(torch.cat(reward.scores).mean()), rel=1e-5)
    plain = Dataset.from_dict({"prompt": PROMPTS[:2], "text": [None] * 2})
    results = trainer.evaluate(plain)
    assert "eval_rewards/written/mean" not in results
    assert results["eval_loss"] == -results["eval_rewards/jpeg/mean"]
    with pytest.raises(RDMError, match="is for none of its prompts"):
        make_trainer(tmp_path, ["dm", Written()], mixed(), eval_dataset=plain).evaluate()


# ---- What weights go by ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["group", "sample"])
def test_fields_are_those_of_its_samples(normalization: Any) -> None:
    """Groups that a reward is not for change no other's field, and one that is for none has no field."""
    gradient, scores = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    gradient[4:], scores[4:] = 0.0, NAN
    mixed_field = normalize({"a": RewardOutput(scores, gradient)}, 4, normalization)["a"]
    alone = normalize({"a": RewardOutput(scores[:4], gradient[:4])}, 4, normalization)["a"]
    torch.testing.assert_close(mixed_field[:4], alone)
    assert not mixed_field[4:].any()
    assert normalize({"a": RewardOutput(scores[4:], gradient[4:])}, 4, normalization) == {}


def test_pulls_are_those_of_its_samples() -> None:
    """Transitions that a reward is not for are not in its pull; one that is for none has no pull."""
    x_0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.0, NAN, -2.0, NAN, 0.0, NAN])
    log_ratios = x_0.square().sum(1)
    pulls = policy_pull(log_ratios, x_0, {"a": advantages, "none": torch.full((6,), NAN)})
    assert pulls.keys() == {"a"}
    assert pulls["a"] == pytest.approx(float((advantages[::2, None] * 2 * x_0.detach()[::2]).abs().mean()), rel=1e-5)


def test_statistics_are_over_its_samples() -> None:
    """What the weighting is told is the mean over samples, not over micro-batches or processes."""
    monitor, judged = Monitor(), SimpleNamespace(label="a", route="gradient", weight=1.0)
    for scores, pull in (([1.0, 1.0, 1.0, 4.0], 2.0), ([8.0, NAN, NAN, NAN], 7.0), ([NAN] * 4, 0.0)):
        output = RewardOutput(torch.tensor(scores))
        monitor.reward(judged, output, 2)  # type: ignore[arg-type]
        monitor.pulls({"a": pull}, {"a": int((~output.scores.isnan()).sum())})
    monitor.pulls({"b": 0.0}, {"b": 0})
    statistics = monitor.step_statistics({"a": 1.0, "b": 1.0}, Processes(), torch.device("cpu"))
    assert statistics.keys() == {"a"}
    assert statistics["a"].score == pytest.approx(15 / 5)
    assert statistics["a"].pull == pytest.approx((4 * 2 + 7) / 5)
    averages = monitor.averages()
    assert "b/pull" not in averages
    assert averages["rewards/a/mean"] == pytest.approx(15 / 5)
    assert averages["a/pull"] == pytest.approx((4 * 2 + 7) / 5)
    assert averages["rewards/a/applies"] == pytest.approx(5 / 12)
    assert averages["rewards/a/zero_std"] == pytest.approx(2 / 3)  # of three groups that it is for


def test_statistics_are_of_one_step() -> None:
    """What the weighting is told of a step has nothing of the steps before."""
    monitor, judged = Monitor(), SimpleNamespace(label="a", route="gradient", weight=1.0)
    for pull, score in ((2.0, 1.0), (7.0, 5.0)):
        monitor.reward(judged, RewardOutput(torch.full((4,), score)), 2)
        monitor.pulls({"a": pull}, {"a": 3})  # of three transitions, and of four scores
        statistics = monitor.step_statistics({"a": 1.0}, Processes(), torch.device("cpu"))
        assert (statistics["a"].pull, statistics["a"].score) == (pull, score)


def test_a_mean_over_chosen_rows_is_over_all_their_values() -> None:
    """Of a field too, so that a pull is in the field's units; of no row it is 0."""
    values, chosen = torch.arange(24.0).reshape(4, 3, 2), torch.tensor([True, False, False, True])
    assert mean_where(values, chosen).item() == torch.cat([values[0], values[3]]).mean().item()
    assert mean_where(values, torch.zeros(4, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("make", [Bright, Written])
def test_balance_gives_a_rare_reward_its_weight(make_digits_trainer: Make, tmp_path: Path, make: Any) -> None:
    """Under `balance` a reward for few prompts is weighed by its pull on those, not thinned out by the others."""

    def weight(prompts: Dataset) -> float:
        trainer = make_digits_trainer(
            tmp_path,
            ["dm", (make(), 0.5)],
            prompts,
            weighting="balance",
            per_device_train_batch_size=40,
            max_steps=2,
        )
        trainer.train()
        return rows_of(trainer)[-1][f"weights/{make.__name__.lower()}"]

    texts: Sequence[str] = [prompt.upper() for prompt in PROMPTS]
    columns: Mapping[str, Sequence[str]] = {"prompt": PROMPTS, "text": texts}
    assert weight(mixed(5)) == pytest.approx(weight(Dataset.from_dict(dict(columns))), rel=0.05)


class Dark(Reward):
    """A reward with a gradient for samples that have a text, whose tilt goes back through the teacher."""

    capabilities = Capabilities(columns=("text",), gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return -batch.images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_process_carries_a_tilt_back(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    """Also the one where the reward is for nobody: a base that is shared out is run by all of them together."""
    carried: list[int] = []
    untouched = Renoised.carry_back

    def counting(renoised: Renoised, vector: Tensor) -> Tensor:
        carried.append(len(vector))
        return untouched(renoised, vector)

    monkeypatch.setattr(Renoised, "carry_back", counting)
    monkeypatch.setattr(Processes, "anywhere", lambda self, names: ["dark"])  # another process has some
    prompts = Dataset.from_dict({"prompt": PROMPTS[:4], "text": ["a", None, None, None]})
    settings = {"reward_route": "tilt", "scale_rewards": scale, "max_steps": 4, "num_generations": 8}
    trainer = make_trainer(tmp_path, ["dm", (Dark(), 0.1)], prompts, **settings)
    trainer.train()
    assert carried == [8] * 4
