"""The preset `dmd2` is DMD2 as it was published: loss, gradient and noise levels.

Here on small latents of SD 1.5 and SDXL; a slow test takes the published shapes.

The reference below is written from arXiv 2405.14867 and its sampling of timesteps: per sample, in the noise predictions
and alphas of the DDPM, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import RDMTrainer, preset

Make = Callable[..., RDMTrainer]
GUIDANCE = 1.75
by_base = pytest.mark.parametrize("pipeline", [tiny_sd, tiny_sdxl], ids=["SD 1.5", "SDXL"])


class Recorder(TrainerCallback):
    """Takes down every pass of the backbone, and the student's gradients before its optimizer's step."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self.gradients: list[Tensor] = []
        self.expected: list[Tensor] = []
        self.loss = torch.zeros(())

    def watch(self, trainer: RDMTrainer) -> None:
        self.trainer = trainer
        run = trainer.roles.forward

        def forward(role: str, **inputs: Any) -> Tensor:
            output = run(role, **inputs)
            self.passes.append((role, inputs["sample"], inputs["timestep"], output))
            return output

        trainer.roles.forward = forward
        trainer.accelerator.backward = lambda loss: loss.backward(retain_graph=True)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        weights = self.trainer.parameters_of("student")
        self.gradients = [p.grad.clone() for p in weights if p.grad is not None]
        kept = self.trainer.family.pipeline.scheduler.alphas_cumprod.double()
        _, real_input, real_time, real_noise = next(own for own in self.passes[::-1] if own[0] == "teacher")
        _, x_t, time, fake_noise = next(own for own in self.passes[::-1] if own[0] == "fake")
        assert torch.equal(real_input, torch.cat([x_t, x_t]))
        assert torch.equal(real_time, torch.cat([time, time]))
        without, with_prompt = real_noise.chunk(2)
        guided = without.double() + GUIDANCE * (with_prompt.double() - without.double())
        _, state, step, student_noise = next(own for own in self.passes[::-1] if own[0] == "student")
        x_0 = clean(state, student_noise, step, kept)
        self.loss = dmd2_loss(x_0, clean(x_t, guided, time, kept), clean(x_t, fake_noise, time, kept))
        self.expected = list(torch.autograd.grad(self.loss, [p for p in weights if p.grad is not None]))


def clean(x_t: Tensor, noise: Tensor, timestep: Tensor, kept: Tensor) -> Tensor:
    """Return x_0 `[N, *x]` of a predicted noise, at whole timesteps `[N]`."""
    assert torch.equal(timestep, timestep.round())
    alpha = kept[timestep.long()].reshape(-1, 1, 1, 1)
    return (x_t.double() - (1 - alpha).sqrt() * noise.double()) / alpha.sqrt()


def dmd2_loss(x_0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return DMD2's loss: half the squared distance to x_0 less a gradient that is scaled per sample."""
    with torch.no_grad():
        to_real, to_fake = x_0 - real, x_0 - fake
        gradient = (to_real - to_fake) / to_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    return 0.5 * torch.nn.functional.mse_loss(x_0, (x_0 - gradient).detach())


def dmd2_trainer(make_trainer: Make, folder: Path, pipeline: Callable[[], Any], latents: int, **settings: Any) -> Any:
    """Return a trainer with the preset's settings, at latents of a size."""
    base = pipeline()
    own: dict[str, Any] = {
        **preset("dmd2"),
        "guidance_scale": GUIDANCE,
        "max_sequence_length": None,
        "height": latents * base.vae_scale_factor,
        "width": latents * base.vae_scale_factor,
        "per_device_train_batch_size": 4,
        "critic_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
    }
    return make_trainer(folder, "dm", ["a fox", "a boat"], model=base, **(own | settings))


@pytest.mark.parametrize(
    ("pipeline", "latents"),
    [
        pytest.param(tiny_sd, 16, id="SD 1.5"),
        pytest.param(tiny_sdxl, 16, id="SDXL"),
        pytest.param(tiny_sd, 64, id="SD 1.5 as published", marks=pytest.mark.slow),
        pytest.param(tiny_sdxl, 128, id="SDXL as published", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_dmd2s(
    make_trainer: Make, tmp_path: Path, pipeline: Callable[[], Any], latents: int
) -> None:
    """One training step: the loss's value, and the gradient of every weight of the student."""
    recorder = Recorder()
    trainer = dmd2_trainer(make_trainer, tmp_path, pipeline, latents, callbacks=[recorder])
    assert trainer.models.latent_shapes == [(4, latents, latents)]
    recorder.watch(trainer)
    trainer.train()
    logged = next(row["loss/pathwise"] for row in trainer.state.log_history if "loss/pathwise" in row)
    assert logged == pytest.approx(recorder.loss.item(), rel=1e-4)
    assert len(recorder.gradients) == len(recorder.expected) > 0
    ours = torch.cat([g.flatten() for g in recorder.gradients]).double()
    theirs = torch.cat([g.flatten() for g in recorder.expected]).double()
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@by_base
def test_every_critic_update_has_rollouts_of_its_own(
    make_trainer: Make, tmp_path: Path, pipeline: Callable[[], Any]
) -> None:
    """The critic is told nothing, and learns at whole timesteps from samples that come once."""
    recorder = Recorder()
    trainer = dmd2_trainer(make_trainer, tmp_path, pipeline, 16, callbacks=[recorder])
    recorder.watch(trainer)
    trainer.train()
    assert not any("step_embedding" in name for name in trainer.roles.parameters_of("fake"))
    assert trainer.costs()["cost/rollouts"] == 4 * 3
    times = [time for role, _, time, _ in recorder.passes if role == "fake"]
    assert all(torch.equal(time, time.round()) for time in times)


@by_base
def test_timesteps_are_drawn_as_dmd2_draws_them(
    make_trainer: Make, tmp_path: Path, pipeline: Callable[[], Any]
) -> None:
    """The student's from 20 to 980 of a thousand, the critic's from all of them, every whole one equally often."""
    trainer = dmd2_trainer(make_trainer, tmp_path, pipeline, 16)
    context = trainer.judge.context(trainer.models.encode(["a fox"]), torch.zeros(1, dtype=torch.long))
    count, cpu = 200_000, torch.device("cpu")
    torch.manual_seed(0)
    draws = {
        (20, 980): context.draw_sigma(count, 1, cpu),
        (0, 999): context.draw_critic_sigma(count, cpu),
    }
    for (first, last), sigma in draws.items():
        timesteps = trainer.family.timesteps(sigma)
        assert torch.equal(timesteps, timesteps.round())
        assert (timesteps.min(), timesteps.max()) == (first, last)
        counts = torch.bincount(timesteps.long(), minlength=1000)[first : last + 1].double()
        expected = count / (last - first + 1)
        # The chi-square statistic, of mean k and variance 2 k for k degrees of freedom.
        degrees = last - first
        excess = ((counts - expected).square() / expected).sum() - degrees
        assert excess.abs() < 5 * (2 * degrees) ** 0.5
        assert counts.min() > 0.6 * expected
