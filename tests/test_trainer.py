"""`RDMTrainer` end to end on the embedded teacher: rewards, logs, costs, two time scales, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import (
    Capabilities,
    ConfigError,
    RDMConfig,
    Reward,
    RewardBatch,
    RewardOutput,
    digits,
    frechet_distance,
    legibility,
)

Make = Callable[..., Any]
Losses = Callable[[Any], list[dict[str, float]]]


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """Score a picture by its mean."""
    return images.mean(dim=(1, 2, 3))


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Return all trained weights."""
    return {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if p.requires_grad}


# ---- Rewards ----------------------------------------------------------------------------------------------------


def test_a_spec_with_a_pixel_reward_trains_and_logs(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """ "dm + 0.5*legibility": both rewards are logged with their weights, and every cost is counted."""
    trainer = make_trainer(tmp_path, "dm + 0.5*legibility")
    trainer.train()
    (first, _) = losses_of(trainer)
    assert first["weights/dm"] == 1.0
    assert first["weights/legibility"] == 0.5
    assert 0 <= first["rewards/legibility/mean"] <= 1
    keys = {f"rewards/{name}/{kind}" for name in ("dm", "legibility") for kind in ("mean", "std")}
    keys |= {"loss", "grad_norm", "loss/dm", "loss/pathwise", "dm/residual", "dm/pull", "legibility/pull"}
    keys |= {f"cost/{role}_forwards" for role in ("student", "teacher", "fake")}
    keys |= {"cost/critic_steps", "cost/reward_calls", "epoch", "step", "learning_rate"}
    assert keys <= first.keys()
    assert not keys & {"loss/policy", "frac_reward_zero_std"}


def test_a_callable_takes_the_same_path_with_its_columns(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """A plain function sees images in [0, 1], prompts and the data set's other columns, sample by sample."""
    seen: list[tuple[Tensor, list[str], list[Any]]] = []

    def mine(images: Tensor, prompts: list[str], digit: list[Any]) -> list[float | None]:
        seen.append((images, prompts, digit))
        return [None if d == 3 else float(i.mean()) for i, d in zip(images, digit, strict=True)]

    data = Dataset.from_dict({"prompt": digits.prompts(), "digit": list(range(10))})
    trainer = make_trainer(tmp_path, ["dm", mine], data, max_steps=5)
    trainer.train()
    rows = losses_of(trainer)
    assert {"rewards/mine/mean", "rewards/mine/std", "weights/mine", "loss/policy", "frac_reward_zero_std"} <= set(
        rows[0]
    )
    assert len(seen) == 5
    for images, prompts, column in seen:
        assert images.shape == (8, 3, 32, 32)
        assert 0 <= images.min() < images.max() <= 1
        assert not images.requires_grad
        assert [digits.prompts()[d] for d in column] == prompts  # columns stay beside their prompts
        assert column == [column[0]] * 4 + [column[4]] * 4  # group-major
    assert {d for _, _, column in seen for d in column} == set(range(10))  # one epoch: each prompt once


def test_names_callables_and_objects_mix_in_a_list(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """A list may hold a spec, a callable and a `Reward`; `reward_weights` multiply the weights of the specs."""

    class Contrast(Reward):
        name = "contrast"
        capabilities = Capabilities(space="latent", gradient="autograd")

        def score(self, batch: RewardBatch) -> Tensor:
            return batch.latents.flatten(1).std(dim=1)

    trainer = make_trainer(tmp_path, ["0.5*dm", brightness, Contrast()], reward_weights=[2.0, 3.0, -1.0])
    trainer.train()
    first = losses_of(trainer)[0]
    assert [first[f"weights/{name}"] for name in ("dm", "brightness", "contrast")] == [1.0, 3.0, -1.0]
    assert first["contrast/pull"] > 0


def test_a_strangers_reward_may_train_its_own_role(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """Distribution matching has no private door: a reward of another name can own and train a role."""

    class Mine(Reward):
        name = "mine"
        capabilities = Capabilities(space="latent", gradient="field", trains="judge")

        def field(self, batch: RewardBatch) -> RewardOutput:
            context = batch.require_context(self.name)
            sigma = torch.full((len(batch.prompts),), 0.5)
            x_t = context.add_noise(batch.latents, sigma)
            gradient = context.denoiser("teacher")(x_t, sigma) - context.denoiser("judge")(x_t, sigma)
            return RewardOutput(-gradient.flatten(1).norm(dim=1), gradient + 0.01)

        def score(self, batch: RewardBatch) -> Tensor:
            return self.field(batch).scores

        def training_loss(self, batch: RewardBatch) -> Tensor:
            context = batch.require_context(self.name)
            sigma = torch.full((len(batch.prompts),), 0.5)
            x_t = context.add_noise(batch.latents, sigma)
            return (context.denoiser("judge")(x_t, sigma) - batch.latents).square().mean()

    trainer = make_trainer(tmp_path, Mine(), learning_rate=1e-2)
    before = weights_of(trainer)
    trainer.train()
    assert trainer.roles.trainable_roles == ("student", "judge")
    assert any("judge" in name and not torch.equal(p, before[name]) for name, p in weights_of(trainer).items())
    assert losses_of(trainer)[0]["loss/mine"] > 0
    assert losses_of(trainer)[0]["cost/judge_forwards"] == 2 * 8 + 8


class Bright(Reward):
    """A differentiable pixel reward: the mean of the picture."""

    name = "bright"
    capabilities = Capabilities(space="pixel", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("reward", ["legibility", Bright()], ids=["builtin", "object"])
def test_a_pixel_reward_alone_needs_no_critic(
    make_trainer: Make, tmp_path: Path, losses_of: Losses, reward: object
) -> None:
    """Without "dm" there is no role "fake", no teacher evaluation and no critic step."""
    trainer = make_trainer(tmp_path, reward, critic_steps=0)
    trainer.train()
    assert trainer.roles.trainable_roles == ("student",)
    assert trainer.roles.forwards.keys() == {"student"}
    assert losses_of(trainer)[-1]["cost/critic_steps"] == 0
    assert losses_of(trainer)[-1]["grad_norm"] > 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_pixel_reward_moves_the_samples_its_way(make_trainer: Make, tmp_path: Path, sign: float) -> None:
    """Gradients reach the student through the decoder with the right sign."""
    trainer = make_trainer(tmp_path, Bright(), critic_steps=0, learning_rate=1e-3, max_steps=8, reward_weights=[sign])
    prompts = digits.prompts() * 4
    before = trainer.sample(prompts, seed=0).mean()
    trainer.train()
    assert sign * (trainer.sample(prompts, seed=0).mean() - before) > 0.01


def test_dm_with_weight_zero_is_plain_reward_tuning(make_trainer: Make, tmp_path: Path) -> None:
    """Law 6: with weight 0, distribution matching changes neither the student's loss nor its gradient route."""
    trainer = make_trainer(tmp_path, "0*dm + legibility")
    trainer.train()
    assert "dm/pull" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["legibility/pull"] > 0


def test_a_callable_on_brightness_raises_brightness(make_trainer: Make, tmp_path: Path) -> None:
    """The policy route learns: a plain function that likes bright pictures gets brighter ones."""
    trainer = make_trainer(
        tmp_path, brightness, per_device_train_batch_size=16, num_generations=16, learning_rate=2e-3, max_steps=25
    )
    prompts = digits.prompts() * 10
    before = trainer.sample(prompts, seed=0).mean()
    trainer.train()
    assert trainer.sample(prompts, seed=0).mean() > before + 0.02


def test_distribution_matching_repairs_a_spoiled_student(make_trainer: Make, tmp_path: Path) -> None:
    """From a student whose weights were disturbed, "dm" finds the way back to the teacher's digits."""
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=16,
        num_generations=8,
        learning_rate=1e-3,
        critic_learning_rate=2e-3,
        guidance_scale=1.5,
        critic_steps=3,
        max_steps=20,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.roles.parameters_of("student").items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.25, generator=generator)
    prompts = digits.prompts() * 20

    def figures() -> tuple[float, float]:
        images = trainer.sample(prompts, seed=0)
        return frechet_distance(images, digits.heldout_images()), legibility(images, prompts)

    (distance, legible) = figures()
    trainer.train()
    (after, legible_after) = figures()
    assert after < 0.6 * distance  # measured: 943 to 238
    assert legible < 0.9 < 0.97 < legible_after  # measured: 0.64 to 1.00


# ---- Hosting ----------------------------------------------------------------------------------------------------


class Counting(TrainerCallback):
    """Counts steps and asks to stop after three."""

    def __init__(self) -> None:
        self.steps = self.logs = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        control.should_training_stop = self.steps == 3

    def on_log(self, *_: Any, **__: Any) -> None:
        self.logs += 1


def test_callbacks_and_max_steps_are_honored(make_trainer: Make, tmp_path: Path) -> None:
    """A run ends after `max_steps`, or when a callback says so; callbacks see each step and log."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    counting = Counting()
    trainer = make_trainer(tmp_path, max_steps=9, callbacks=[counting])
    trainer.train()
    assert trainer.state.global_step == counting.steps == 3
    assert counting.logs == 4  # three steps and the summary


def test_epochs_are_honored(make_trainer: Make, tmp_path: Path) -> None:
    """Without `max_steps`, two epochs of ten prompts in micro-batches of two groups are ten steps."""
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 10


def test_each_epoch_has_an_order_of_its_own(make_trainer: Make, tmp_path: Path) -> None:
    """Every epoch holds each prompt once, and two epochs differ in order."""
    seen: list[str] = []

    def watching(images: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts[::4])
        return brightness(images, prompts)

    make_trainer(tmp_path, ["dm", watching], max_steps=10).train()
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(digits.prompts())
    assert seen[:10] != seen[10:]


# Four groups of two: a rollout to the end, which the critics learn from, costs 8 x 4 = 32 evaluations, and replaying
# the trained steps 8. Where critics have rollouts of their own, all stop where they are of use: each of the four steps
# comes once, which is 2 (1 + 2 + 3 + 4) = 20. A critic update costs 8, judging another 8 (guided, the teacher's 16).
@pytest.mark.parametrize(
    ("settings", "student", "teacher", "fake", "critic"),
    [
        ({}, 40, 8, 24, 2),
        ({"guidance_scale": 1.5}, 40, 16, 24, 2),
        ({"num_draws": 3}, 40, 24, 40, 2),
        ({"critic_steps": 5}, 40, 8, 48, 5),
        ({"critic_rollouts": "fresh"}, 68, 8, 24, 2),
        ({"gradient_accumulation_steps": 2}, 80, 16, 48, 2),
        ({"log_images": 1}, 40, 8, 24, 2),  # pictures are no cost of training
        ({"gradient_checkpointing": True}, 40, 8, 24, 2),  # nor is a replay of activations a new evaluation
    ],
    ids=lambda value: ",".join(value) or "plain" if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_costs_are_exact(
    make_trainer: Make,
    tmp_path: Path,
    losses_of: Losses,
    settings: dict[str, Any],
    student: int,
    teacher: int,
    fake: int,
    critic: int,
) -> None:
    """Every network evaluation, critic update and reward call is counted, per optimizer step."""
    trainer = make_trainer(tmp_path, **({"num_generations": 2, "max_steps": 3} | settings))
    trainer.train()
    accumulation = settings.get("gradient_accumulation_steps", 1)
    for step, row in enumerate(losses_of(trainer), start=1):
        counted = {name: row[f"cost/{name}"] / step for name in ("critic_steps", "reward_calls")}
        counted |= {role: row[f"cost/{role}_forwards"] / step for role in ("student", "teacher", "fake")}
        assert counted == {
            "student": student,
            "teacher": teacher,
            "fake": fake,
            "critic_steps": critic,
            "reward_calls": 8 * accumulation,
        }
    assert len(losses_of(trainer)) == 3


def test_costs_with_a_scored_reward(make_trainer: Make, tmp_path: Path) -> None:
    """Scored rewards judge endpoints, so every trajectory is finished: 4 x 8 evaluations, then 8 to replay."""
    trainer = make_trainer(tmp_path, ["dm", brightness], num_generations=2, max_steps=1)
    trainer.train()
    costs = trainer.costs()
    assert costs["cost/student_forwards"] == 32 + 8
    assert costs["cost/reward_calls"] == 2 * 8


class OptimizerSteps(TrainerCallback):
    """Reads, at each optimizer step, how often each role's parameters have been stepped."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.read: list[tuple[int, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        optimizers = {"student": self.trainer.optimizer, "fake": self.trainer.critic_optimizer.optimizer}
        counts = [
            {int(own.state[p]["step"]) for p in self.trainer.parameters_of(role) if own.state.get(p)}
            for role, own in optimizers.items()
        ]
        self.read.append((max(counts[0]), max(counts[1])))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_time_scales(make_trainer: Make, tmp_path: Path, accumulation: int) -> None:
    """The critic takes `critic_steps` updates per student update, whatever the accumulation, at its own rate."""
    watch = OptimizerSteps()
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        critic_steps=3,
        learning_rate=1e-4,
        critic_learning_rate=5e-4,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    assert watch.read == [(1, 3), (2, 6)]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-4]
    assert [group["initial_lr"] for group in trainer.critic_optimizer.optimizer.param_groups] == [5e-4, 5e-3]


def test_clipping_is_per_role(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's gradient is clipped by its own limit, the student's by Trainer's, neither with the other."""
    norms: list[tuple[int, float]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watching(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        parameters = list(parameters)
        norms.append((sum(p.grad is not None for p in parameters), float(max_norm)))
        return clip(parameters, max_norm, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watching)
    trainer = make_trainer(tmp_path, max_grad_norm=0.25, critic_max_grad_norm=0.5, critic_steps=2, max_steps=1)
    with_gradient = len(trainer.parameters_of("fake"))
    trainer.train()
    assert [limit for _, limit in norms] == [0.5, 0.5, 0.25]
    assert all(0 < count <= with_gradient for count, _ in norms)


def test_accumulation_averages_micro_batches(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """Two micro-batches of one group log a loss of the size of one, not twice it."""
    one = make_trainer(tmp_path, "dm", max_steps=8)
    two = make_trainer(tmp_path, "dm", max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for trainer in (one, two):
        trainer.train()
    sums = [sum(row["loss/pathwise"] for row in losses_of(t)) for t in (one, two)]
    assert 0.6 < sums[0] / sums[1] < 1.6
    for row in losses_of(two):
        assert row["loss"] == pytest.approx(row["loss/pathwise"], rel=1e-4)


def test_the_same_seed_gives_the_same_weights(make_trainer: Make, tmp_path: Path) -> None:
    """Two runs with one seed end with the same bits; another seed ends elsewhere."""
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(tmp_path, ["dm", brightness], seed=seed)
        trainer.train()
        runs.append(weights_of(trainer))
    first, again, other = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pictures_do_not_change_the_run(make_trainer: Make, tmp_path: Path) -> None:
    """`log_images` writes a PNG with three labeled rows every so many steps, and training goes on as without."""
    runs = []
    for every in (0, 2):
        trainer = make_trainer(tmp_path, log_images=every, max_steps=4)
        trainer.train()
        runs.append(weights_of(trainer))
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["step_000002.png", "step_000004.png"]
    with Image.open(files[0]) as picture:
        assert picture.format == "PNG"
        assert picture.height >= 3 * 64
        assert picture.width >= 10 * 64
    assert all(torch.equal(runs[1][name], p) for name, p in runs[0].items())


def test_bf16_runs_on_cpu(make_trainer: Make, tmp_path: Path, losses_of: Losses) -> None:
    """With bf16 the base is bfloat16, the trained weights and losses stay float32 and finite."""
    trainer = make_trainer(tmp_path, "dm + legibility", bf16=True, learning_rate=1e-2)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert trainer.family.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.isfinite(p).all() for p in after.values())
    assert all(row["loss"] == row["loss"] and row["grad_norm"] > 0 for row in losses_of(trainer))


def test_activation_checkpointing_gives_the_same_run(make_trainer: Make, tmp_path: Path) -> None:
    """Recomputing activations changes memory and time, not the weights."""
    runs = []
    for recompute in (False, True):
        trainer = make_trainer(tmp_path, "dm + legibility", activation_checkpointing=recompute, learning_rate=1e-3)
        assert trainer.family.backbone.is_gradient_checkpointing is False
        trainer.train()
        assert trainer.family.backbone.is_gradient_checkpointing is recompute
        runs.append(weights_of(trainer))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ({"activation_checkpointing": True}, True),
        ({"gradient_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
        ({}, False),
    ],
)
def test_activation_checkpointing_has_both_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, bool], on: bool
) -> None:
    """Before transformers had a field of the newer name, Trainer read the older one; a changed copy is as it says."""
    monkeypatch.setattr("rdm_sdk.training.config.TrainingArguments", object)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    config = RDMConfig(output_dir=str(tmp_path), **given)
    assert config.gradient_checkpointing is config.activation_checkpointing is on
    changed = replace(config, gradient_checkpointing=True)
    assert changed.gradient_checkpointing is changed.activation_checkpointing is True


def test_prompts_from_a_text_file(make_trainer: Make, tmp_path: Path) -> None:
    """A text file's path serves as training prompts."""
    (tmp_path / "prompts.txt").write_text("seven\n\ntwo\n", encoding="utf-8")
    trainer = make_trainer(tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))
    trainer.train()
    assert trainer.train_dataset["prompt"][:] == ["seven", "two"]


def test_roles_may_have_different_loras(make_trainer: Make, tmp_path: Path) -> None:
    """Student and critic take their own ranks; the critic follows the student by default."""
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), fake_peft_config=LoraConfig(r=6))
    assert [trainer.roles.lora_config(role).r for role in ("student", "fake")] == [2, 6]
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=3))
    assert trainer.roles.lora_config("fake").r == 3


# ---- Samples and evaluation -------------------------------------------------------------------------------------


def test_sampling_with_a_seed_is_repeatable_and_leaves_no_trace(make_trainer: Make, tmp_path: Path) -> None:
    """The same seed gives the same pictures, the global random state stays, and no cost is counted."""
    trainer = make_trainer(tmp_path)
    costs, random = trainer.costs(), torch.get_rng_state()
    first = trainer.sample(["seven", "two"], seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.costs() == costs
    assert first.shape == (2, 3, 32, 32)
    assert 0 <= first.min() < first.max() <= 1
    torch.randn(5)
    assert torch.equal(trainer.sample(["seven", "two"], seed=3), first)
    assert not torch.equal(trainer.sample(["seven", "two"], seed=4), first)
    one, other = trainer.sample(["seven"]), trainer.sample(["seven"])
    assert not torch.equal(one, other)  # without a seed, the global state moves on


def test_sample_shows_the_moving_average(make_trainer: Make, tmp_path: Path) -> None:
    """With `ema_decay`, samples come from the average, and the raw weights are back afterwards."""
    trainer = make_trainer(tmp_path, ema_decay=0.99, learning_rate=5e-2)
    trainer.train()
    raw = weights_of(trainer)
    averaged = trainer.sample(["seven"], seed=0)
    assert all(torch.equal(raw[name], p) for name, p in weights_of(trainer).items())
    trainer.models.ema = None
    assert (trainer.sample(["seven"], seed=0) - averaged).abs().max() > 1e-3


class RawWeights(TrainerCallback):
    """Copies the student's raw weights after each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.taken: list[list[Tensor]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.taken.append([p.detach().clone() for p in self.trainer.parameters_of("student")])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_moving_average_is_one_of_all_steps(make_trainer: Make, tmp_path: Path, accumulation: int) -> None:
    """Once per optimizer step, average = d average + (1 - d) weights, with diffusers' warm-up of d."""
    raw = RawWeights()
    trainer = make_trainer(
        tmp_path,
        ema_decay=0.15,
        learning_rate=1e-2,
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        callbacks=[raw],
    )
    raw.trainer = trainer
    trainer.train()
    average = raw.taken[0]
    for step, weights in enumerate(raw.taken[1:], start=1):
        decay = min(0.15, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    for got, expected in zip(trainer.ema.shadow_params, average, strict=True):
        torch.testing.assert_close(got, expected)
    assert any((got - p).abs().max() > 1e-4 for got, p in zip(trainer.ema.shadow_params, raw.taken[-1], strict=True))


def test_evaluate_scores_finished_samples(make_trainer: Make, tmp_path: Path) -> None:
    """`evaluate` gives each image reward's mean, the same each time, and costs the training nothing."""
    trainer = make_trainer(tmp_path, "dm + 0*legibility", eval_dataset=digits.prompts() * 3)
    random, costs = torch.get_rng_state(), trainer.costs()
    metrics = trainer.evaluate()
    assert 0.1 < metrics["eval_rewards/legibility/mean"] <= 1
    assert metrics["eval_loss"] == -metrics["eval_rewards/legibility/mean"]
    assert "eval_rewards/dm/mean" not in metrics
    assert trainer.evaluate() == metrics
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.costs() == costs
    other = trainer.evaluate(["a handwritten seven"], metric_key_prefix="test")
    assert other.keys() - {"epoch"} == {"test_rewards/legibility/mean", "test_loss"}


def test_evaluation_during_training(make_trainer: Make, tmp_path: Path) -> None:
    """`eval_strategy` works as with any Trainer, and does not change the run."""
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(tmp_path, "dm + 0*legibility", eval_dataset=digits.prompts(), **settings)
        trainer.train()
        runs.append(trainer)
    plain, evaluated = runs
    assert sum("eval_loss" in row for row in evaluated.state.log_history) == 2
    assert all(torch.equal(p, weights_of(evaluated)[name]) for name, p in weights_of(plain).items())


def test_evaluate_needs_a_judge_of_images(make_trainer: Make, tmp_path: Path) -> None:
    """Distribution matching alone cannot judge finished pictures; the message says what to add."""
    with pytest.raises(ConfigError, match=r"dm \+ 0\*legibility"):
        make_trainer(tmp_path, "dm", eval_dataset=["seven"]).evaluate()
    with pytest.raises(ConfigError, match="eval_dataset"):
        make_trainer(tmp_path, "legibility").evaluate()


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer: Make, tmp_path: Path) -> None:
    """`load_best_model_at_end` really brings the best checkpoint's weights back (here: the first, brightest one)."""
    trainer = make_trainer(
        tmp_path,
        Bright(),
        reward_weights=[-1.0],
        critic_steps=0,
        learning_rate=1e-2,
        max_steps=3,
        eval_dataset=digits.prompts(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "rdm_state.safetensors")
    for name, tensor in trainer.roles.role_state_dict("student").items():
        assert torch.equal(tensor, best[f"student.{name}"]), name
