"""The adversary as a reward: gradient, learning, its column of real images, its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from transformers import set_seed

from rdm_sdk import ConfigError, DataError, RDMError, RDMTrainer, RewardBatch, RewardError, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.rewards.adversarial import Adversarial
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.evaluate import evaluate_reward

Make = Callable[..., RDMTrainer]


def no_denoiser(role: str) -> Any:
    raise AssertionError("a discriminator asks no denoiser")


def to_pil(image: Tensor) -> Image.Image:
    """Return a picture as PIL has it."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


# ---- The gradient -----------------------------------------------------------------------------------------------


def toy() -> tuple[Adversarial, RewardBatch]:
    """Return a discriminator on made-up features and a batch, all in double precision."""
    torch.manual_seed(1)
    reward = Adversarial(hidden=8)
    head = reward.make_head(5, 0).double()
    latents = torch.randn(4, 5, 3, 3, dtype=torch.float64)

    def features(x_t: Tensor, sigma: Tensor) -> Tensor:
        return torch.sin(x_t.double()).flatten(2).transpose(1, 2) * (1 + sigma.double()).reshape(-1, 1, 1)

    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=no_denoiser,
        min_time=0.02,
        max_time=0.98,
        features=features,
        head=lambda role: head,
    )
    return reward, RewardBatch(latents=latents, prompts=["a"] * 4, group_size=4, decode=lambda x: x, context=context)


def log_d(batch: RewardBatch, x_0: Tensor) -> Tensor:
    """Return log D(x_t) `[N]` for other clean samples under the batch's noise."""
    assert batch.context is not None
    renoised = batch.context.renoise(batch.latents, batch.group_size)
    sigma = renoised.sigma.double().reshape(-1, 1, 1, 1)
    eps = (renoised.x_t - (1 - sigma) * batch.latents) / sigma
    x_t = (1 - sigma) * x_0 + sigma * eps
    tokens = torch.sin(x_t).flatten(2).transpose(1, 2) * (1 + sigma[:, 0])
    head = batch.context.head("discriminator")
    return torch.log(torch.sigmoid(head(tokens)))


def test_the_gradient_is_that_of_log_d_in_the_clean_sample() -> None:
    """d/dx_0 of log D(alpha x_0 + sigma eps), by finite differences along random directions."""
    reward, batch = toy()
    output = reward.field(batch)
    torch.testing.assert_close(output.scores, log_d(batch, batch.latents).detach())
    assert torch.equal(reward.score(batch).detach(), output.scores)
    for seed in range(3):
        direction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ahead, behind = (log_d(batch, batch.latents + h * direction) for h in (1e-4, -1e-4))
        expected = ((ahead - behind) / 2e-4).detach()
        got = (output.gradient * direction).sum((1, 2, 3))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert output.gradient.abs().max() > 1e-3
    assert output.magnitude is None


def test_judging_leaves_no_gradient_on_the_head() -> None:
    """The student's turn: the discriminator is read, not trained."""
    reward, batch = toy()
    evaluate_reward(
        reward,
        RewardBatch(
            latents=batch.latents.float(),
            prompts=batch.prompts,
            group_size=4,
            decode=batch.decode,
            context=batch.context,
        ),
    )
    assert batch.context is not None
    head = batch.context.head("discriminator")
    assert all(p.grad is None for p in head.parameters())


def test_the_loss_is_the_non_saturating_one() -> None:
    """softplus(-logit(real)) + weighted softplus(logit(fake)); importance weights act on the fake half alone."""
    torch.manual_seed(0)
    reward = Adversarial(hidden=4)
    head = reward.make_head(1, 0)
    nn.init.zeros_(head.logit.weight)
    nn.init.constant_(head.logit.bias, 0.7)  # so that every logit is 0.7
    features = lambda x_t, sigma: x_t.flatten(2).transpose(1, 2)  # noqa: E731
    context = DiffusionContext(
        schedule=FlowSchedule(),
        denoiser=no_denoiser,
        min_time=0.02,
        max_time=0.98,
        features=features,
        encode_images=lambda images: images[:, :1],
        head=lambda role: head,
    )
    columns = {"image": [np.zeros((4, 4, 3), np.uint8)] * 2}
    batch = RewardBatch(
        latents=torch.zeros(2, 1, 4, 4),
        prompts=["a"] * 2,
        group_size=2,
        decode=lambda x: x,
        columns=columns,
        context=context,
        weights=torch.tensor([0.5, 2.0]),
    )
    loss = reward.training_loss(batch)
    real, fake = np.log1p(np.exp(-0.7)), np.log1p(np.exp(0.7))
    assert loss.item() == pytest.approx(real + fake * (0.5 + 2.0) / 2, rel=1e-5)
    loss.backward()
    assert head.logit.bias.grad.abs().sum() > 0


# ---- Learning ---------------------------------------------------------------------------------------------------


def test_it_learns_to_tell_two_sets_apart_on_the_embedded_teacher() -> None:
    """A few dozen steps on the teacher's features: real digits get a higher log D than digits with faint ink."""
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    torch.manual_seed(0)
    reward = Adversarial(hidden=32)
    head = reward.make_head(family.feature_width, 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    images, words = digits.heldout_images(), digits.heldout_labels().tolist()

    def batch_of(rows: slice) -> tuple[RewardBatch, Tensor]:
        prompts = [digits.prompts()[label] for label in words[rows]]
        condition = family.encode_prompts(prompts)
        context = DiffusionContext(
            schedule=family.schedule,
            denoiser=no_denoiser,
            min_time=0.02,
            max_time=0.98,
            features=family.features(family.roles, "teacher", condition),
            encode_images=family.encode_images,
            head=lambda role: head,
        )
        columns = {"image": [to_pil(image) for image in images[rows]]}
        spoiled = family.encode_images(images[rows] * 0.3)
        return RewardBatch(
            latents=spoiled, prompts=prompts, group_size=1, decode=family.decode, columns=columns, context=context
        ), family.encode_images(images[rows])

    def margin() -> float:
        fake, real = batch_of(slice(468, 500))
        with torch.no_grad():
            torch.manual_seed(3)
            on_fake = reward.score(fake)
            judged = RewardBatch(
                latents=real,
                prompts=fake.prompts,
                group_size=1,
                decode=fake.decode,
                context=batch_of(slice(468, 500))[0].context,
            )
            torch.manual_seed(3)
            return (reward.score(judged) - on_fake).mean().item()

    before = margin()
    for step in range(30):
        loss = reward.training_loss(batch_of(slice(16 * step, 16 * step + 16))[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(before) < 0.3
    assert margin() > 1.0
    assert not any(p.requires_grad for p in family.backbone.parameters())


def with_pictures(**extra: list[Any]) -> Dataset:
    """Return the digits' prompts, each beside a real picture."""
    labels, images = digits.heldout_labels().tolist(), digits.heldout_images()
    chosen = [to_pil(images[labels.index(digit)]) for digit in range(10)]
    return Dataset.from_dict({"prompt": digits.prompts(), "image": chosen} | extra)


def test_in_a_run_it_trains_its_head_and_moves_the_student(
    make_trainer: Make, tmp_path: Path, losses_of: Callable[[RDMTrainer], list[dict[str, float]]]
) -> None:
    """Its loss falls, the head changes and is counted in no denoiser's cost but the teacher's."""
    trainer = make_trainer(
        tmp_path, "adversarial", with_pictures(), critic_steps=4, critic_learning_rate=1e-2, max_steps=6
    )
    assert trainer.roles.trainable_roles == ("student", "discriminator")
    before = [p.detach().clone() for p in trainer.parameters_of("discriminator")]
    trainer.train()
    rows = losses_of(trainer)
    assert rows[-1]["adversarial/critic_loss"] < rows[0]["adversarial/critic_loss"]
    assert all(row["rewards/adversarial/mean"] < 0 for row in rows)
    assert rows[0]["adversarial/pull"] > 0
    assert rows[0]["grad_norm"] > 0
    after = trainer.parameters_of("discriminator")
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert rows[0]["cost/teacher_forwards"] == 4 * 2 * 8 + 8


def test_one_object_serves_two_runs(
    make_trainer: Make, tmp_path: Path, losses_of: Callable[[RDMTrainer], list[dict[str, float]]]
) -> None:
    """Each run reads the head that it trains itself: a second trainer changes nothing about the first."""
    reward = Adversarial()
    losses = []
    for others in (0, 1):
        first = make_trainer(tmp_path / f"{others}", reward, with_pictures(), critic_learning_rate=1e-2, max_steps=2)
        for _ in range(others):
            make_trainer(tmp_path / "second", reward, with_pictures())
        set_seed(0)  # making a trainer draws random numbers
        first.train()
        losses.append([row["adversarial/critic_loss"] for row in losses_of(first)])
    assert losses[0] == losses[1]


def test_the_head_may_be_sized_and_the_column_named(make_trainer: Make, tmp_path: Path) -> None:
    """Options reach the head, and another column is asked for by its name."""
    trainer = make_trainer(tmp_path, "dm + adversarial[hidden=5]", with_pictures())
    assert trainer.roles.parameters_of("discriminator")["logit.weight"].shape == (1, 5)
    with pytest.raises(DataError, match=r"'adversarial' needs a column 'images'.*Did you mean 'image'"):
        make_trainer(tmp_path, "dm + adversarial[column=images]", with_pictures(), model="no/such/model")
    with pytest.raises(DataError, match="'adversarial' needs a column 'image', and train_dataset has none"):
        make_trainer(tmp_path, "dm + adversarial", model="no/such/model")
    with pytest.raises(RewardError, match="hidden"):
        make_trainer(tmp_path, "dm + adversarial[hidden=0]", with_pictures(), model="no/such/model")


def test_pictures_of_another_size_are_refused(make_trainer: Make, tmp_path: Path) -> None:
    """Their latents must be the run's; the message says what to do."""
    small = Dataset.from_dict({"prompt": ["one"], "image": [Image.new("RGB", (16, 16))]})
    with pytest.raises(DataError, match=r"encode to \[1, 4, 4\], the run's samples are \[1, 8, 8\]; resize"):
        make_trainer(tmp_path, "dm + adversarial", small).train()


def test_steps_of_several_sizes_are_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A picture encodes to one size, so that some step would find none of its own; told before the base is loaded."""
    settings = {"resolutions": ["8x8", "16x16"], "model": "no/such/model"}
    with pytest.raises(ConfigError, match=r"'adversarial' learns from a column of real images, each of one size"):
        make_trainer(tmp_path, "dm + adversarial", with_pictures(), **settings)


def test_without_a_teacher_it_says_so() -> None:
    """Finished images alone cannot be judged."""
    reward = Adversarial()
    with pytest.raises(RewardError, match="'adversarial' needs the models of a training run"):
        evaluate_reward(reward, RewardBatch.from_images(torch.rand(2, 3, 8, 8)))
    context = DiffusionContext(schedule=FlowSchedule(), denoiser=no_denoiser, min_time=0.02, max_time=0.98)
    with pytest.raises(RDMError, match="needs a teacher's features"):
        reward.field(
            RewardBatch(
                latents=torch.zeros(2, 1, 4, 4), prompts=["a"] * 2, group_size=2, decode=lambda x: x, context=context
            )
        )


def test_two_of_them_would_share_a_role(make_trainer: Make, tmp_path: Path) -> None:
    """The module of one would stay as it was drawn, and pull all the same."""
    data = Dataset.from_dict({"prompt": ["a zero"], "a": [None], "b": [None]})
    with pytest.raises(ConfigError, match="bring a module each for the role 'discriminator'"):
        make_trainer(tmp_path, "dm + 0.1*adversarial[column=a] + 0.1*adversarial[column=b]", data)
