"""What critics learn and are told: steps, ranges or the mixture; at which noise levels; and their own optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import rdm_sdk.training.step
from rdm_sdk import ConfigError, ModelError, RDMTrainer, digits
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import StepEmbedding
from rdm_sdk.families.sd3 import SD3Family
from rdm_sdk.method.noise import FlowSchedule, VariancePreservingSchedule
from rdm_sdk.method.sampling import FewStepPolicy
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.types import select_steps

Make = Callable[..., RDMTrainer]
TOLD = "step_embedding.vectors."


class Watched(DistributionMatching):
    """Distribution matching that takes down what its critic learns from and what is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[dict[str, Tensor]] = []
        self.judged: list[dict[str, Tensor]] = []

    def field(self, batch: Any) -> Any:
        draw = batch.context.renoise(batch.latents, batch.group_size)
        self.judged.append({"x_0": batch.latents, "x_t": draw.x_t, "sigma": draw.sigma})
        return super().field(batch)

    def training_loss(self, batch: Any) -> Tensor:
        draws: list[Tensor] = []
        draw = batch.context.draw_critic_sigma

        def watching(*args: Any) -> Tensor:
            draws.append(draw(*args))
            return draws[-1]

        object.__setattr__(batch.context, "draw_critic_sigma", watching)
        loss = super().training_loss(batch)
        self.trained.append({"x_0": batch.latents, "sigma": draws[0]})
        return loss


def told_vectors(trainer: RDMTrainer) -> dict[str, Tensor]:
    """Return what the critic is told, per part of the condition `[K, C]`."""
    return {n.removeprefix(TOLD): p for n, p in trainer.roles.parameters_of("fake").items() if n.startswith(TOLD)}


# ---- Told the step ----------------------------------------------------------------------------------------------


def test_a_step_embedding_tells_parts_with_vectors_and_no_others() -> None:
    """A vector per step is added to tokens and pooled text; masks and a guidance scale stay as they are."""
    condition = {
        "tokens": torch.zeros(3, 2, 4, dtype=torch.bfloat16),
        "pooled": torch.zeros(3, 5),
        "mask": torch.ones(3, 2, dtype=torch.long),
        "guidance": torch.full((3,), 3.5),
    }
    embedding = StepEmbedding(2, condition)
    assert {name: list(v.shape) for name, v in embedding.vectors.items()} == {"tokens": [2, 4], "pooled": [2, 5]}
    steps = torch.tensor([0, 1, 1])
    assert all(torch.equal(part, condition[name]) for name, part in embedding(condition, steps).items())  # from zero
    with torch.no_grad():
        embedding.vectors["tokens"][1] = 1.0
        embedding.vectors["pooled"][0] = 2.0
    told = embedding(condition, steps)
    assert told["tokens"].dtype == torch.bfloat16
    assert told["tokens"][:, :, 0].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert told["pooled"][:, 0].tolist() == [2, 0, 0]
    assert told["mask"] is condition["mask"]
    assert told["guidance"] is condition["guidance"]


@pytest.mark.parametrize("critic_weights", ["lora", "full"])
def test_the_critic_alone_is_told(make_trainer: Make, tmp_path: Path, critic_weights: str) -> None:
    """The vectors start at zero, learn ten times as fast, are the critic's, and change neither teacher nor student."""
    trainer = make_trainer(tmp_path, critic_weights=critic_weights, critic_learning_rate=1e-3, save_strategy="no")
    vectors = told_vectors(trainer)
    assert {name: list(v.shape) for name, v in vectors.items()} == {
        "encoder_hidden_states": [4, 64],
        "pooled_projections": [4, 64],
    }
    assert all(not v.any() for v in vectors.values())
    assert not any(TOLD in name for name in trainer.roles.parameters_of("student"))
    condition = trainer.models.encode(digits.prompts()[:4])
    x_t, sigma, steps = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
    before = trainer.models.denoiser("teacher", condition)(x_t, sigma)
    trainer.train()
    assert all(bool((v != 0).any(1).all()) for v in vectors.values())  # every step's
    assert torch.equal(trainer.models.denoiser("teacher", condition)(x_t, sigma), before)
    critic = trainer.models.denoiser("fake", condition, steps)(x_t, sigma)
    assert not torch.equal(critic, trainer.models.denoiser("fake", condition, steps.flip(0))(x_t, sigma))
    with pytest.raises(ConfigError, match="'fake' is told the student's step, and none is given"):
        trainer.models.denoiser("fake", condition)


def test_what_the_critic_was_told_is_saved_and_exported_nowhere(make_trainer: Make, tmp_path: Path) -> None:
    """The vectors are in the checkpoint's state, as the critic's; the student's export knows nothing of them."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, critic_learning_rate=1e-3)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "rdm_state.safetensors")
    for name, vector in told_vectors(trainer).items():
        assert torch.equal(saved[f"fake.{TOLD}{name}"], vector)
    exported = load_file(tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert not any("step_embedding" in name or "vectors" in name for name in exported)


@pytest.mark.parametrize("settings", [{"matching": "mixture"}, {"matching": "range"}, {"num_inference_steps": 1}])
def test_nobody_is_told_where_there_is_nothing_to_tell(
    make_trainer: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """DMD2's mixture, ranges, and a student of one step: the critic has no vectors."""
    trainer = make_trainer(tmp_path, **settings)
    assert told_vectors(trainer) == {}
    trainer.train()


def test_a_head_is_told_too(make_trainer: Make, tmp_path: Path) -> None:
    """The discriminator's head has a vector per step; in the mixture it has none."""
    from datasets import Dataset

    pictures = [image.permute(1, 2, 0).mul(255).byte().numpy() for image in digits.heldout_images()[:10]]
    data = Dataset.from_dict({"prompt": digits.prompts(), "image": pictures})
    trainer = make_trainer(tmp_path / "told", "dm + 0.1*adversarial", data)
    trainer.train()
    vectors = trainer.roles.parameters_of("discriminator")["steps.weight"]
    assert vectors.shape == (4, 128)
    assert (vectors != 0).any(1).all()
    plain = make_trainer(tmp_path / "mixture", "dm + 0.1*adversarial", data, matching="mixture")
    assert "steps.weight" not in plain.roles.parameters_of("discriminator")


def test_a_family_without_an_example_is_named(make_trainer: Make, tmp_path: Path) -> None:
    """What a critic is told is made to the shape of the family's encodings, which it has to say."""
    from rdm_sdk.families.load import load_family

    class Plain(SD3Family):
        example_encoding = ModelFamily.example_encoding

    pipeline = load_family(digits.teacher_path(), torch.float32).pipeline
    with pytest.raises(ModelError, match=r"Plain names no example_encoding.*matching='step'"):
        make_trainer(tmp_path, model=Plain(pipeline, max_sequence_length=4))


# ---- Samples ----------------------------------------------------------------------------------------------------


def test_critics_learn_from_all_steps_of_shared_rollouts(make_trainer: Make, tmp_path: Path) -> None:
    """Each update takes another step of each trajectory; over K of them, every predicted x_0 comes once."""
    watched = Watched()
    trainer = make_trainer(tmp_path, watched, critic_steps=4, max_steps=1)
    trainer.train()
    (experience,) = trainer.step.rollouts.experiences
    predicted = experience.rollout.x_0
    seen = torch.zeros(4, 8, dtype=torch.long)
    for turn, update in enumerate(watched.trained):
        steps = (experience.steps + 1 + turn) % 4
        # The trained step's own x_0 is replaced by the replay's, which may differ in its last bits.
        torch.testing.assert_close(update["x_0"], select_steps(predicted, steps))
        seen[steps, torch.arange(8)] += 1
    assert (seen == 1).all()


def test_critics_of_later_uses_learn_from_what_is_new(make_trainer: Make, tmp_path: Path) -> None:
    """When a rollout is used again, only the x_0 that the student has predicted anew is its present self's."""
    watched = Watched()
    trainer = make_trainer(tmp_path, watched, critic_steps=2, num_iterations=2, max_steps=2, learning_rate=1e-5)
    trainer.train()
    assert len(watched.judged) == 2
    for update in watched.trained[2:]:
        torch.testing.assert_close(update["x_0"], watched.judged[1]["x_0"])


def test_fresh_rollouts_are_fresh(make_trainer: Make, tmp_path: Path) -> None:
    """DMD2's critic updates: each on samples of its own, none of them the student's."""
    watched = Watched()
    make_trainer(tmp_path, watched, critic_rollouts="fresh", critic_steps=3, max_steps=1).train()
    seen = [update["x_0"] for update in (*watched.trained, *watched.judged)]
    assert len({x_0.sum().item() for x_0 in seen}) == 4


# ---- Noise levels -----------------------------------------------------------------------------------------------


def test_ranges(make_trainer: Make, tmp_path: Path) -> None:
    """Samples of step k are re-noised between the level that it leads to and its own, by critic and student alike."""
    watched = Watched()
    trainer = make_trainer(tmp_path, watched, matching="range", max_steps=1, critic_steps=4)
    trainer.train()
    (experience,) = trainer.step.rollouts.experiences
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    plans = [(experience.steps + 1 + turn) % 4 for turn in range(4)]
    for seen, steps in [*zip(watched.trained, plans, strict=True), (watched.judged[0], experience.steps)]:
        assert (seen["sigma"] >= levels[steps + 1].clamp_min(0.02)).all()
        assert (seen["sigma"] <= levels[steps].clamp_max(0.98)).all()


def test_on_the_path(make_trainer: Make, tmp_path: Path) -> None:
    """A sample is judged between the states that it leads from and to, on the line; critics learn at all times."""
    watched = Watched()
    trainer = make_trainer(tmp_path, watched, matching="path", sampler="ode", max_steps=1, critic_steps=4)
    trainer.train()
    (experience,) = trainer.step.rollouts.experiences
    (judged,) = watched.judged
    levels, steps = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), experience.steps
    start, end = levels[steps], levels[steps + 1]
    assert (judged["sigma"] >= end.clamp_min(0.02)).all()
    assert (judged["sigma"] <= start.clamp_max(0.98)).all()
    states = torch.cat([experience.rollout.states, experience.rollout.x_0[-1:]])
    share = ((start - judged["sigma"]) / (start - end)).reshape(-1, 1, 1, 1)
    expected = torch.lerp(select_steps(states, steps), select_steps(states, steps + 1), share)
    torch.testing.assert_close(judged["x_t"], expected, rtol=0, atol=1e-4)
    outside = []
    for turn, update in enumerate(watched.trained):
        taken = (steps + 1 + turn) % 4
        outside.append((update["sigma"] < levels[taken + 1]) | (update["sigma"] > levels[taken]))
    assert torch.cat(outside).float().mean() > 0.5
    assert {vectors.shape[0] for vectors in told_vectors(trainer).values()} == {4}


@pytest.mark.parametrize("matching", ["step", "mixture"])
def test_full_range(make_trainer: Make, tmp_path: Path, matching: str) -> None:
    """Otherwise the student's samples are re-noised from min_time to max_time, and critics learn at all times."""
    trainer = make_trainer(tmp_path, matching=matching, min_time=0.3, max_time=0.4)
    context = trainer.judge.context(trainer.models.encode(["seven"]), torch.zeros(1, dtype=torch.long))
    levels = context.draw_sigma(1000, 1, torch.device("cpu"))
    assert 0.3 <= levels.min() < 0.301
    assert 0.399 < levels.max() <= 0.4
    levels = context.draw_critic_sigma(1000, torch.device("cpu"))
    assert 0.001 <= levels.min() < 0.003
    assert 0.998 < levels.max() <= 1


# ---- The critics' optimizer -------------------------------------------------------------------------------------


def test_critics_have_an_optimizer_of_their_own(make_trainer: Make, tmp_path: Path) -> None:
    """Rate, betas, weight decay and schedule of the critics' are their own, and reach no weight of the student's."""
    trainer = make_trainer(
        tmp_path,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        adam_beta1=0.5,
        weight_decay=0.1,
        critic_learning_rate=4e-4,
        critic_lr_scheduler_type="linear",
        critic_adam_beta1=0.25,
        critic_adam_beta2=0.75,
        critic_weight_decay=0.0,
        max_steps=4,
    )
    trainer.train()
    (student,) = trainer.optimizer.param_groups
    critics = trainer.critic_optimizer.optimizer.param_groups
    assert (student["lr"], student["betas"], student["weight_decay"]) == (1e-4, (0.5, trainer.args.adam_beta2), 0.1)
    assert {(own["betas"], own["weight_decay"]) for own in critics} == {((0.25, 0.75), 0.0)}
    assert [own["lr"] for own in critics] == [0.0, 0.0]  # fallen to zero at the end of the run
    assert [own["initial_lr"] for own in critics] == [4e-4, 4e-3]
    held = {role: set(map(id, trainer.parameters_of(role))) for role in ("student", "fake")}
    assert set(map(id, student["params"])) == held["student"]
    assert {id(p) for own in critics for p in own["params"]} == held["fake"]


def test_critics_take_the_student_s_settings_where_they_have_none(make_trainer: Make, tmp_path: Path) -> None:
    """None means the student's, for each of them; but critics learn twice as fast."""
    trainer = make_trainer(tmp_path, learning_rate=3e-4, adam_beta1=0.5, weight_decay=0.1, lr_scheduler_type="linear")
    trainer.train()
    group = trainer.critic_optimizer.optimizer.param_groups[0]
    assert (group["initial_lr"], group["lr"], group["betas"][0], group["weight_decay"]) == (6e-4, 0.0, 0.5, 0.1)


def test_an_optimizer_from_outside_is_refused(tmp_path: Path, small_config: Callable[..., Any]) -> None:
    """It could not hold the weights that are trained, which do not exist yet: the student would never move."""
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="optimizers cannot be given"):
        RDMTrainer(
            digits.teacher_path(),
            args=small_config(tmp_path),
            train_dataset=digits.prompts(),
            optimizers=(torch.optim.AdamW([weight]), None),
        )


def test_training_twice_goes_on(make_trainer: Make, tmp_path: Path) -> None:
    """A second train() starts the schedules again and keeps both optimizers, as Trainer does."""
    trainer = make_trainer(tmp_path, lr_scheduler_type="linear", critic_learning_rate=1e-3)
    trainer.train()
    first = trainer.critic_optimizer
    trainer.train()
    assert trainer.critic_optimizer is first


# ---- After each evaluation --------------------------------------------------------------------------------------


def test_samples_after_each_step(make_trainer: Make, tmp_path: Path) -> None:
    """K sets of images, the last of which are `sample`'s own; the moving average is what is sampled."""
    trainer = make_trainer(tmp_path, ema_decay=0.9, peft_config=LoraConfig(r=4, lora_alpha=8), learning_rate=1e-2)
    trainer.train()
    each = trainer.sample_each_step(digits.prompts(), seed=3)
    assert [list(images.shape) for images in each] == [[10, 3, 32, 32]] * 4
    assert torch.equal(each[-1], trainer.sample(digits.prompts(), seed=3))
    assert not torch.equal(each[0], each[-1])


# ---- How much each step counts ----------------------------------------------------------------------------------


def test_step_weights_make_all_steps_pull_alike() -> None:
    """On a flow 1 / sigma, on a DDPM that predicts the noise alpha / sigma; 1 on average, and alone."""
    flow = FewStepPolicy(FlowSchedule(), (1.0, 0.75, 0.5, 0.25))
    weights = flow.step_weights(torch.arange(4))
    torch.testing.assert_close(weights * torch.tensor([1.0, 0.75, 0.5, 0.25]), weights[0].expand(4))
    assert weights.mean().item() == pytest.approx(1)
    assert torch.equal(flow.step_weights(torch.tensor([3, 3, 0])), weights[[3, 3, 0]])
    assert FewStepPolicy(FlowSchedule(), (1.0,)).step_weights(torch.zeros(2, dtype=torch.long)).tolist() == [1, 1]
    noise = FewStepPolicy(VariancePreservingSchedule(), (0.8, 0.6))
    weights = noise.step_weights(torch.arange(2))
    assert (weights[1] / weights[0]).item() == pytest.approx((0.8 / 0.6) / (0.6 / 0.8))


@pytest.mark.parametrize("matching", ["step", "path", "range", "mixture"])
def test_steps_are_weighted_where_each_is_matched_by_itself(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matching: str
) -> None:
    """The field of a sample is multiplied by its step's weight; in DMD2's mixture every step counts the same."""
    seen: list[Tensor] = []
    loss = rdm_sdk.training.step.pathwise_loss

    def watching(x_0: Tensor, field: Tensor) -> Tensor:
        seen.append(field)
        return loss(x_0, field)

    def ones(fields: Any, weights: Any) -> Tensor:
        return torch.ones_like(fields["dm"])

    monkeypatch.setattr(rdm_sdk.training.step, "pathwise_loss", watching)
    monkeypatch.setattr(rdm_sdk.training.step, "combine", ones)
    sampler = "ode" if matching == "path" else "renoise"
    trainer = make_trainer(tmp_path, matching=matching, sampler=sampler, max_steps=1)
    trainer.train()
    (experience,) = trainer.step.rollouts.experiences
    weights = trainer.models.policy.step_weights(experience.steps)
    expected = torch.ones(8) if matching == "mixture" else weights
    assert torch.equal(seen[0], expected.reshape(8, 1, 1, 1).expand_as(seen[0]))
    assert weights.unique().numel() == 4
