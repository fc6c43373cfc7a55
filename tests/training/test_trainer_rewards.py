"""Several rewards in the trainer: each on its own route, logged, and with its errors where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rdm_sdk import Capabilities, ConfigError, DataError, RDMError, RDMTrainer, Reward, RewardBatch, RewardError, digits

Make = Callable[..., RDMTrainer]


class LatentSize(Reward):
    """A latent reward: small latents are good."""

    capabilities = Capabilities(space="latent", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return -batch.latents.square().mean(dim=(1, 2, 3))


class GroupSpread(Reward):
    """Compares within groups."""

    capabilities = Capabilities(scope="group", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        grouped = batch.images.mean(dim=(1, 2, 3)).reshape(-1, batch.group_size)
        return (grouped - grouped.mean(1, keepdim=True)).square().flatten()


class NeedsColumn(Reward):
    """Reads a column of the dataset."""

    capabilities = Capabilities(columns=("target",))

    def score(self, batch: RewardBatch) -> Tensor:
        return -(batch.images.mean(dim=(1, 2, 3)) - torch.tensor(batch.columns["target"])).abs()


def ink(images, prompts, **columns):
    """A scored reward."""
    return images.mean(dim=(1, 2, 3)).tolist()


ALL_KINDS = ["dm", "0.5*legibility", (LatentSize(), 0.1), (GroupSpread(), 0.1), (ink, 0.2), "0.2*jpeg"]


def test_all_routes_in_one_run(make_trainer: Make, tmp_path: Path) -> None:
    """Pixel and latent gradients, group rewards and scored ones train together, each with its own logs."""
    trainer = make_trainer(tmp_path, ALL_KINDS)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for name in ("legibility", "latentsize", "groupspread", "ink", "jpeg"):
        assert {f"rewards/{name}/{what}" for what in ("mean", "std", "zero_std", "seconds")} <= rows[0].keys(), name
    for name in ("dm", "legibility", "latentsize", "groupspread"):
        assert rows[0][f"{name}/pull"] > 0
    assert {"loss/policy", "loss/pathwise", "frac_reward_zero_std"} <= rows[0].keys()
    assert rows[0]["weights/jpeg"] == 0.2
    assert rows[0]["cost/reward_calls"] == 6 * 8


@pytest.mark.parametrize("settings", [{"reward_batch_size": 3}, {"reward_offload": True}, {"reward_device": "cpu"}])
def test_memory_settings_change_nothing_else(
    make_trainer: Make, tmp_path: Path, losses_of: Any, settings: dict[str, Any]
) -> None:
    """Chunks, offloading and the rewards' device leave the run as it is."""

    def run(name: str, **extra: Any) -> list[dict[str, float]]:
        trainer = make_trainer(tmp_path / name, "dm + 0.5*legibility + 0.2*jpeg", **extra)
        trainer.train()
        return [{k: v for k, v in row.items() if not k.endswith("/seconds")} for row in losses_of(trainer)]

    (plain, later), (with_setting, later_with) = run("plain"), run("set", **settings)
    assert with_setting == pytest.approx(plain, rel=1e-4, abs=1e-6)
    # A pixel whose last bit differs can cost JPEG a byte, which then is a step of the advantages.
    assert later_with == pytest.approx(later, rel=1e-2, abs=1e-5)


def test_reward_batch_size_bounds_what_a_reward_sees(make_trainer: Make, tmp_path: Path) -> None:
    """A micro-batch of eight is judged three samples at a time."""
    sizes: list[int] = []

    def watch(images, prompts, **columns):
        sizes.append(len(images))
        return images.mean(dim=(1, 2, 3)).tolist()

    make_trainer(tmp_path, ["dm", watch], max_steps=1, reward_batch_size=3).train()
    assert sizes == [3, 3, 2]


def failing_after(calls: int) -> Any:
    """A function that works for some calls and then raises."""
    count = 0

    def flaky(images, prompts, **columns):
        nonlocal count
        count += 1
        if count > calls:
            raise ConnectionError("the judge went home")
        return images.mean(dim=(1, 2, 3)).tolist()

    return flaky


def test_a_callable_that_raises_in_the_middle_stops_the_run(make_trainer: Make, tmp_path: Path) -> None:
    """Its own exception arrives, and what was saved before is whole and can be resumed from."""
    trainer = make_trainer(
        tmp_path, ["dm", failing_after(2)], max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=None
    )
    with pytest.raises(ConnectionError, match="the judge went home"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    again = make_trainer(tmp_path, ["dm", failing_after(99)], max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_skip_goes_on_and_counts(make_trainer: Make, tmp_path: Path, losses_of: Any) -> None:
    """With "skip", the run goes on without the reward, and the logs say how often it was missing."""
    trainer = make_trainer(tmp_path, ["dm", failing_after(1)], max_steps=3, reward_on_error="skip")
    trainer.train()
    rows = losses_of(trainer)
    assert [row["rewards/flaky/skipped"] for row in rows] == [0.0, 1.0, 1.0]
    assert "rewards/flaky/mean" in rows[0]
    assert "rewards/flaky/mean" not in rows[1]
    assert "loss/policy" not in rows[1]


def test_a_skipped_score_makes_the_others_no_larger(make_trainer: Make, tmp_path: Path, losses_of: Any) -> None:
    """Advantages of a step without a reward are those of a run without it, whatever its weight."""
    rows = []
    for name, more in (("alone", []), ("beside", [(failing_after(0), 2.0)])):
        trainer = make_trainer(tmp_path / name, ["dm", (ink, 0.2), *more], max_steps=1, reward_on_error="skip")
        trainer.train()
        rows += losses_of(trainer)
    assert rows[1]["rewards/flaky/skipped"] == 1
    assert rows[1]["loss/policy"] == rows[0]["loss/policy"]
    assert rows[1]["grad_norm"] == rows[0]["grad_norm"]


def test_skipping_everything_is_an_error(make_trainer: Make, tmp_path: Path) -> None:
    """A run with nothing left to learn from stops."""
    trainer = make_trainer(tmp_path, [failing_after(0)], reward_on_error="skip")
    with pytest.raises(RDMError, match="every reward was skipped"):
        trainer.train()


def test_columns_are_asked_for_before_anything_is_loaded(make_trainer: Make, tmp_path: Path) -> None:
    """A missing column is named, with the nearest one that is there; a present one reaches the reward."""
    with pytest.raises(
        DataError, match=r"'needscolumn' needs a column 'target', and train_dataset has none.*prompt, targt"
    ):
        make_trainer(
            tmp_path,
            ["dm", NeedsColumn()],
            Dataset.from_dict({"prompt": ["one"], "targt": [0.1]}),
            model="no/such/model",
        )
    prompts = Dataset.from_dict({"prompt": digits.prompts(), "target": [0.1] * 10})
    make_trainer(tmp_path, ["dm", NeedsColumn()], prompts, max_steps=1).train()


@pytest.mark.parametrize(
    ("rewards", "settings", "error", "words"),
    [
        (["dm", GroupSpread()], {"num_generations": 1}, ConfigError, "compares the samples of one prompt"),
        ("dm", {"reward_batch_size": 0}, ConfigError, "reward_batch_size=0"),
        ("dm", {"reward_device": "gpu7"}, ConfigError, "reward_device='gpu7'.*such as"),
        ("dm", {"reward_on_error": "skp"}, ConfigError, "Did you mean 'skip'"),
        ("dm + jpeg[qualty=3]", {}, RewardError, r"'jpeg' has no option 'qualty'. Did you mean 'quality'\?"),
        ("dm + jpeg[quality=3000]", {}, RewardError, "'jpeg', option quality: .*got 3000"),
        ("dm + jpge", {}, RewardError, "unknown reward 'jpge'. Did you mean 'jpeg'"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    make_trainer: Make, tmp_path: Path, rewards: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Settings, options and names are checked first."""
    with pytest.raises(error, match=words):
        make_trainer(tmp_path, rewards, model="no/such/model", **settings)


def test_evaluate_judges_groups_and_leaves_nothing_out(make_trainer: Make, tmp_path: Path) -> None:
    """Group rewards get whole groups in evaluation too, even where the evaluation batch tears them apart."""
    trainer = make_trainer(
        tmp_path, ["dm", GroupSpread(), "jpeg"], eval_dataset=digits.prompts()[:4], per_device_eval_batch_size=3
    )
    results = trainer.evaluate()
    assert results.keys() >= {"eval_rewards/groupspread/mean", "eval_rewards/jpeg/mean", "eval_loss"}
    assert results["eval_rewards/groupspread/mean"] > 0


def test_evaluate_follows_the_same_policy(make_trainer: Make, tmp_path: Path) -> None:
    """A reward that raises is skipped in evaluation too; with nothing left, the error says so."""
    settings = {"eval_dataset": digits.prompts()[:2], "reward_on_error": "skip"}
    results = make_trainer(tmp_path, ["dm", failing_after(0), "0*jpeg"], **settings).evaluate()
    assert "eval_rewards/jpeg/mean" in results
    assert "eval_rewards/flaky/mean" not in results
    with pytest.raises(RDMError, match="every reward was skipped in evaluate"):
        make_trainer(tmp_path, ["dm", failing_after(0)], **settings).evaluate()


def test_a_critic_does_not_train_the_student(make_trainer: Make, tmp_path: Path) -> None:
    """The roles of student and teacher are taken."""

    class Usurper(LatentSize):
        capabilities = Capabilities(space="latent", gradient="autograd", trains="student")

        def training_loss(self, batch: RewardBatch) -> Tensor:
            return batch.latents.sum()

    with pytest.raises(ConfigError, match="trains='student'"):
        make_trainer(tmp_path, ["dm", Usurper()], model="no/such/model")


def test_the_model_card_names_options(make_trainer: Make, tmp_path: Path) -> None:
    """The export says which rewards it was trained with, as a spec that parses back."""
    trainer = make_trainer(tmp_path, "dm + 0.25*jpeg[quality=80]")
    trainer.save_model(str(tmp_path / "student"))
    assert "- Rewards: `dm + 0.25*jpeg[quality=80]`" in (tmp_path / "student" / "README.md").read_text()
