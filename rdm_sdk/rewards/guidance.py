"""Guidance as a reward: the implicit classifier that the teacher's two predictions make."""

from __future__ import annotations

from torch import Tensor

from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch
from rdm_sdk.rewards.context import contrast
from rdm_sdk.types import RewardOutput


class Guidance(Reward):
    """log p(c | x) as the teacher sees it: log p(x | c) - log p(x), up to a constant of the prompt.

    Classifier-free guidance splits as D_real^cfg - D_fake = (D_real - D_fake) + (s - 1)(D_real - D_uncond), wherever a
    family's guidance is linear (Qwen-Image's is not). The second term is this reward's gradient, so "dm + w*guidance"
    in a run with `guidance_scale=1` is distribution matching with its guidance decoupled: a weight of s - 1 makes DMD's
    guided gradient out of the two, from the same forward passes.
    It is measured against |x_0 - D_real|, as `dm` is, so that one divisor normalizes both and the sum keeps its
    direction. DMD divides the guided gradient by the guided residual, |x_0 - D_real^cfg|, which is mostly larger: the
    decoupled sum pulls harder than `guidance_scale=s` does, by the ratio of the two.
    """

    name = "guidance"
    capabilities = Capabilities(space="latent", gradient="field", prompts=True, stochastic=True, parameters=0)

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)
        return contrast(context, batch.latents, batch.group_size, lambda renoised: renoised.teacher_pair())

    def score(self, batch: RewardBatch) -> Tensor:
        return self.field(batch).scores
