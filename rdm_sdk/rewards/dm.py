"""R_dm, distribution matching, as a reward like any other."""

from __future__ import annotations

from torch import Tensor

from rdm_sdk.method.matching import denoising_loss
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.rewards.context import TEACHER, Renoised, contrast
from rdm_sdk.types import RewardOutput


class DistributionMatching(Reward):
    """Distribution matching: the teacher's distribution against the student's, as a trained critic sees it.

    Gradient in x_0 form, D_real - D_fake, averaged over the run's `num_draws` renoising draws, with the critic's lag
    taken out where the run says so (`critic_correction`); score by the denoising-error difference; the critic is a LoRA
    adapter, role "fake", trained on the student's samples (arXiv 2405.14867 for the estimator, arXiv 2603.28460 for its
    reading as a reward). It is told which of the student's steps made a sample where the run says so (`matching`).
    """

    name = "dm"
    capabilities = Capabilities(space="latent", gradient="field", trains="fake", stochastic=True, parameters=0)

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)

        def pair(draw: Renoised) -> tuple[Tensor, Tensor]:
            return draw.x_0(TEACHER), draw.x_0("fake")

        return contrast(context, batch.latents, batch.group_size, pair, context.critic_correction)

    def score(self, batch: RewardBatch) -> Tensor:
        return self.field(batch).scores

    def training_loss(self, batch: RewardBatch) -> Tensor:
        context = batch.require_context(self.name)
        x_0 = batch.latents
        sigma = context.draw_critic_sigma(len(x_0), x_0.device)
        denoised = context.denoiser("fake")(context.add_noise(x_0, sigma), sigma)
        return batch.average(denoising_loss(context.schedule, x_0, denoised, sigma))
