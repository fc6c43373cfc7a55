"""An adversary as a reward: a discriminator's head on the teacher's features (the GAN term of DMD2)."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rdm_sdk.errors import DataError
from rdm_sdk.method.noise import per_sample
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.rewards.images import read_images
from rdm_sdk.types import RewardOutput


class DiscriminatorHead(nn.Module):
    """Tokens of features `[N, T, C]` to logits `[N]`: above 0 for real.

    Args:
        width: C.
        hidden: width of the hidden layer.
        num_steps: K, if the head is told which of the student's steps made a sample; 0 if not.
    """

    def __init__(self, width: int, hidden: int, num_steps: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.steps = nn.Embedding.from_pretrained(torch.zeros(num_steps, hidden), freeze=False) if num_steps else None
        self.logit = nn.Linear(hidden, 1)

    def forward(self, features: Tensor, steps: Tensor | None = None) -> Tensor:
        hidden = self.hidden(features)
        if self.steps is not None:
            hidden = hidden + self.steps(steps)[:, None]
        logits: Tensor = self.logit(F.silu(hidden).mean(1))[:, 0]
        return logits


class Adversarial(Reward):
    """log D(x_t): how real a discriminator finds the re-noised sample; it learns from a column of real images.

    The discriminator is a small head on what the frozen teacher's middle block says of x_t, trained with the
    non-saturating loss (arXiv 1406.2661) at the run's noise levels, as DMD2 does on its critic (arXiv 2405.14867). Its
    role is "discriminator"; as any critic's, its learning rate is `critic_learning_rate`, and it is told the student's
    step where critics are.
    """

    name = "adversarial"
    capabilities = Capabilities(
        space="latent",
        gradient="field",
        trains="discriminator",
        head=True,
        stochastic=True,
        range=(-float("inf"), 0.0),
        parameters=0,
    )

    class Config(RewardConfig):
        column: str = "image"
        """The data set's column of real images: PIL images, 8-bit `[H, W, 3]` arrays or float `[3, H, W]` in [0, 1]."""
        hidden: int = Field(128, ge=1)
        """Width of the head."""

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.capabilities = replace(self.capabilities, columns=(self.config.column,))

    def make_head(self, feature_width: int, num_steps: int) -> nn.Module:
        return DiscriminatorHead(feature_width, self.config.hidden, num_steps)

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)
        renoised = context.renoise(batch.latents, batch.group_size)
        x_t = renoised.x_t.detach().requires_grad_()
        with torch.enable_grad():
            scores = F.logsigmoid(self._logits(batch, x_t, renoised.sigma))
            (gradient,) = torch.autograd.grad(scores.sum(), x_t)
        signal = per_sample(context.schedule.alpha(renoised.sigma), x_t)  # d x_t / d x_0
        return RewardOutput(scores.detach(), signal * gradient)

    def score(self, batch: RewardBatch) -> Tensor:
        renoised = batch.require_context(self.name).renoise(batch.latents, batch.group_size)
        return F.logsigmoid(self._logits(batch, renoised.x_t, renoised.sigma))

    def training_loss(self, batch: RewardBatch) -> Tensor:
        context = batch.require_context(self.name)
        name = self.config.column
        real = context.encode_images(read_images(batch.columns[name], f"column {name!r}", DataError))
        real = real.to(batch.latents.device, torch.float32)
        if real.shape != batch.latents.shape:
            raise DataError(
                f"column {name!r}: its images encode to {list(real.shape[1:])}, the run's samples are "
                f"{list(batch.latents.shape[1:])}; resize the images to the run's height and width"
            )
        sigma = context.draw_critic_sigma(len(real), real.device)
        on_real = self._logits(batch, context.add_noise(real, sigma), sigma)
        on_fake = self._logits(batch, context.add_noise(batch.latents, sigma), sigma)
        return F.softplus(-on_real).mean() + batch.average(F.softplus(on_fake))

    def _logits(self, batch: RewardBatch, x_t: Tensor, sigma: Tensor) -> Tensor:
        context = batch.require_context(self.name)
        if context.features is None:
            raise DataError(f"reward {self.name!r} needs a teacher's features, and this batch has none")
        head = context.head(str(self.capabilities.trains))
        return cast("Tensor", head(context.features(x_t, sigma), context.steps))
