"""Half precision that overflows is named where it happens, and NaN never reaches a reward as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import ModelError, RDMConfig, RDMTrainer, RewardBatch, RewardError, digits, score_images
from rdm_sdk.families.load import load_family
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.resolve import resolve_rewards

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def with_an_overflowing_vae(pipeline: Any, layer: int = 0) -> Any:
    """Make the VAE's first layer (or another) too large for float16; norms behind it make NaN of infinity."""
    pipeline.vae.to(torch.float16)
    layers = [m for m in pipeline.vae.decoder.modules() if getattr(m, "bias", None) is not None]
    layers[layer].weight.data.fill_(6e4)
    layers[layer].bias.data.fill_(6e4)
    return pipeline


@pytest.mark.parametrize("kind", sorted(set(TINY_PIPELINES) - {"SanaPipeline"}))
def test_a_vae_that_overflows_is_named(kind: str) -> None:
    """With its dtype and what to do."""
    family = load_family(with_an_overflowing_vae(TINY_PIPELINES[kind]()), torch.float32)
    latents = torch.randn(1, *family.latent_shape(32, 32))
    with pytest.raises(ModelError, match=r"the VAE \(\w+ in float16\) makes NaN or infinite pixels of finite latents"):
        family.decode(latents)
    family.decode(latents * float("nan"))  # what the student made of it is not the VAE's fault


def test_a_vae_that_ends_in_infinity_is_named() -> None:
    """It would become a white pixel otherwise."""
    family = load_family(with_an_overflowing_vae(TINY_PIPELINES["FluxPipeline"](), layer=-1), torch.float32)
    with pytest.raises(ModelError, match="makes NaN or infinite pixels of finite latents"):
        family.decode(torch.randn(1, *family.latent_shape(32, 32)))


@pytest.mark.parametrize("reward", ["dm + legibility", "dm + 0*legibility"])
def test_a_vae_that_overflows_stops_a_run(make_trainer: Callable[..., RDMTrainer], tmp_path: Path, reward: str) -> None:
    """Also where a reward's own mistakes would be skipped."""
    pipeline = with_an_overflowing_vae(DiffusionPipeline.from_pretrained(digits.teacher_path()))
    trainer = make_trainer(tmp_path, reward, model=pipeline, reward_on_error="skip")
    with pytest.raises(ModelError, match=r"in float16.*keep it in float32"):
        trainer.train()
    with pytest.raises(ModelError, match=r"in float16.*keep it in float32"):
        trainer.sample(["three"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_reward_sees_images_that_are_not_finite(value: float, on_error: Any) -> None:
    """Whoever made them: a diverged student, or the caller."""
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 0, 0] = value
    seen: list[Tensor] = []

    def constant(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(images)
        return torch.ones(len(images))

    with pytest.raises(RewardError, match=r"images must lie in \[0, 1\]; they span"):
        score_images(constant, images, ["a", "b"])
    batch = RewardBatch(latents=images, prompts=["a", "b"], group_size=1, decode=lambda pixels: pixels)
    rewards = {one.label: one.reward for one in resolve_rewards(["dm", constant]) if one.label == "constant"}
    with pytest.raises(RewardError, match="images hold NaN or infinite pixels, which no reward can judge"):
        evaluate_rewards(rewards, batch, gradients_of=(), on_error=on_error)
    assert seen == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_that_overflows_is_named(
    small_config: Callable[..., RDMConfig], tmp_path: Path, value: float
) -> None:
    """At the first prompt whose encoding is not finite, and not as a critic that diverges."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    encode = pipeline.encode_prompt

    def overflowing(*arguments: Any, **options: Any) -> Any:
        embeds, *rest = encode(*arguments, **options)
        prompts = options.get("prompt") or arguments[0]
        seven = torch.tensor(["seven" in prompt for prompt in prompts])  # of a batch
        return (embeds.masked_fill(seven[:, None, None], value), *rest)

    pipeline.encode_prompt = overflowing
    trainer = RDMTrainer(pipeline, "dm", small_config(tmp_path), ["a three", "a seven"] * 4)
    words = r"the encoding of the prompt 'a seven' holds NaN or infinite values.*text_encoder in float32.*bfloat16"
    with pytest.raises(ModelError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ModelError, match=words):
        trainer.sample(["a seven"])
    trainer.sample(["a three"])
