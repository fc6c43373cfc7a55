"""R_dm, distribution matching, as a reward like any other."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rdm_sdk.method.matching import denoising_loss, shared_square
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.rewards.context import TEACHER, DiffusionContext, Renoised, contrast
from rdm_sdk.types import RewardOutput


class DistributionMatching(Reward):
    """Distribution matching: the teacher's distribution against the student's, as a trained critic sees it.

    Gradient in x_0 form, D_real - D_fake, at the sample re-noised, with the critic's lag taken out where the
    run says so (`critic_correction`); score by the denoising-error difference; the critic is a LoRA
    adapter, role "fake", trained on the student's samples (arXiv 2405.14867 for the estimator, arXiv 2603.28460 for its
    reading as a reward). It is told which of the student's steps made a sample where the run says so (`matching`).
    On the student's own path (PDMD, arXiv 2609.35768) the gradient is what of D_real - D_fake is across the critic's
    residual x_0 - D_fake, and the score, whose noise is no fresh draw, is for logs alone.
    """

    name = "dm"
    capabilities = Capabilities(space="latent", gradient="field", trains="fake", stochastic=True, parameters=0)

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)

        def pair(renoised: Renoised) -> tuple[Tensor, Tensor]:
            return renoised.x_0(TEACHER), renoised.x_0("fake")

        output = contrast(
            context, batch.latents, batch.group_size, pair, context.critic_correction, projected=context.on_path
        )
        return replace(output, figures=self._figures(context, batch))

    @staticmethod
    def _figures(context: DiffusionContext, batch: RewardBatch) -> dict[str, Tensor]:
        """Return what tells a critic that follows from one that lags, from predictions that are there already.

        All are mean squares per value of a latent: "gap" of D_real - D_fake, "error" of x_0 - D_fake, and "lag" of the
        part of that error which a group's samples have in common (`shared_square`). For an exact critic the lag is 0,
        and gap plus error is the square of x_0 - D_real: the gap is what of it the student could still learn.
        Groups of one sample have no lag to tell.
        """
        x_0, size = batch.latents, batch.group_size
        renoised = context.renoise(x_0, size)
        fake = renoised.x_0("fake")
        gap, error = (
            difference.float().square().flatten(1).mean(1) for difference in (renoised.x_0(TEACHER) - fake, x_0 - fake)
        )
        return {"gap": gap, "error": error} | ({"lag": shared_square(x_0 - fake, size)} if size > 1 else {})

    def score(self, batch: RewardBatch) -> Tensor:
        return self.field(batch).scores

    def training_loss(self, batch: RewardBatch) -> Tensor:
        context = batch.require_context(self.name)
        x_0 = batch.latents
        sigma = context.draw_critic_sigma(len(x_0), x_0.device)
        denoised = context.denoiser("fake")(context.add_noise(x_0, sigma), sigma)
        return batch.average(denoising_loss(context.schedule, x_0, denoised, sigma))
