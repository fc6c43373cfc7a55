"""Law 9 for every training sampler: the exported student in plain diffusers gives the trainer's own images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor

from rdm_sdk import RDMTrainer, digits

PROMPTS = ["a handwritten seven", "a handwritten two", "the digit four"]


@pytest.fixture(scope="session")
def make_trainer(make_digits_trainer: Callable[..., RDMTrainer]) -> Callable[..., RDMTrainer]:
    """Return the maker of runs on the embedded teacher, whose pictures are looked at here."""
    return make_digits_trainer


@pytest.mark.parametrize(
    ("sampler", "settings", "stochastic"),
    [
        ("renoise", {"num_iterations": 2}, True),
        ("ode", {"reward_route": "gradient"}, False),
        ("cps", {"reward_route": "advantage", "eta": 0.6}, False),
        ("sde", {"reward_route": "advantage", "shift": 2.0}, False),
    ],
)
def test_plain_diffusers_gives_the_trainers_images(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, sampler: str, settings: dict[str, object], stochastic: bool
) -> None:
    """Scheduler, LoRA (alpha other than the rank) and grid survive; without the LoRA the images are others."""
    trainer = make_trainer(
        tmp_path / "run",
        "dm + 0.3*legibility",
        sampler=sampler,
        peft_config=LoraConfig(r=4, lora_alpha=12),
        learning_rate=2e-2,
        critic_steps=1,
        **settings,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))

    noise = torch.randn(len(PROMPTS), 1, 8, 8, generator=torch.Generator().manual_seed(11))
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    assert pipeline.scheduler.config.stochastic_sampling == stochastic

    def images_of(seed: int) -> Tensor:
        torch.manual_seed(seed)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 4, "output_type": "pt"}
        return pipeline(PROMPTS, latents=noise, **call).images

    without = images_of(5)
    pipeline.load_lora_weights(tmp_path / "student")
    torch.manual_seed(5)
    expected = trainer.sample(PROMPTS, noise=noise)
    assert (images_of(5) - expected).abs().max() <= 1e-4
    assert (without - expected).abs().max() > 1e-2
    assert torch.equal(images_of(5), images_of(6)) == (not stochastic)
