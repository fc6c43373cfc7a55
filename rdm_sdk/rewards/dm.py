"""R_dm, distribution matching, as a reward like any other."""

from __future__ import annotations

import torch
from torch import Tensor

from rdm_sdk.core.matching import denoising_loss, matching_gradient, matching_score, residual_magnitude
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.types import RewardOutput


class DistributionMatching(Reward):
    """Distribution matching: the teacher's distribution against the student's own, as a trained critic sees it.

    Gradient in x_0 form, D_real - D_fake, averaged over the run's `num_draws` renoising draws, all of a group at one
    noise level; score by the denoising-error difference; the critic is a LoRA adapter, role "fake", trained on the
    student's samples (arXiv 2405.14867 for the estimator, arXiv 2603.28460 for its reading as a reward).
    """

    name = "dm"
    capabilities = Capabilities(space="latent", gradient="field", trains="fake", stochastic=True)

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)
        x_0 = batch.latents
        real, fake = context.denoiser("teacher"), context.denoiser("fake")
        sigma = context.draw_sigma(len(x_0) // batch.group_size, batch.group_size, x_0.device)
        draws = []
        for _ in range(context.num_draws):
            x_t = context.add_noise(x_0, sigma)
            d_real, d_fake = real(x_t, sigma), fake(x_t, sigma)
            span = context.max_sigma - context.min_sigma
            draws.append(
                (
                    matching_score(context.schedule, x_0, d_real, d_fake, sigma, span),
                    matching_gradient(d_real, d_fake),
                    residual_magnitude(x_0, d_real),
                )
            )
        scores, gradients, magnitudes = (torch.stack(parts).mean(0) for parts in zip(*draws, strict=True))
        return RewardOutput(scores, gradients, magnitudes)

    def score(self, batch: RewardBatch) -> Tensor:
        return self.field(batch).scores

    def training_loss(self, batch: RewardBatch) -> Tensor:
        context = batch.require_context(self.name)
        x_0 = batch.latents
        sigma = context.draw_sigma(len(x_0), 1, x_0.device)
        denoised = context.denoiser("fake")(context.add_noise(x_0, sigma), sigma)
        return denoising_loss(context.schedule, x_0, denoised, sigma).mean()
