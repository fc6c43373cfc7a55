"""The teacher's flow as a reward: what the student's last steps should make of the state that they see."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.method.matching import residual_magnitude
from rdm_sdk.method.sampling import follow_flow
from rdm_sdk.rewards.base import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.rewards.context import TEACHER
from rdm_sdk.types import RewardOutput


class TeacherFlow(Reward):
    """-1/2 |x_0 - F(x_k)|^2: how near a sample is to where the teacher's own flow leads from the student's state x_k.

    For samples of the student's last step alone, or of its `last_steps`. There little noise is left, so that the flow's
    end is a function of the state that a network learns well, and if the steps before made the right distribution, the
    flow keeps it (docs/method.md). DMD's regression (arXiv 2311.18828) asks for the same of the first step, from pairs
    of noise and image made beforehand; this one asks at the states that the student reaches.
    Its gradient is F(x_k) - x_0, in the teacher's terms, and it is measured against |x_0 - D_real|, as that of `dm`.
    """

    name = "flow"
    capabilities = Capabilities(
        space="latent",
        gradient="field",
        stochastic=True,  # the magnitude alone, which is taken at the noise of `dm`
        range=(-float("inf"), 0.0),
        parameters=0,
    )
    may_sit_out = True

    class Config(RewardConfig):
        last_steps: int = Field(1, ge=1)
        """For samples of how many of the student's last steps it is."""
        num_inference_steps: int = Field(8, ge=1)
        """The teacher's steps from the student's state to the end."""

    def field(self, batch: RewardBatch) -> RewardOutput:
        context, x_0 = batch.require_context(self.name), batch.latents
        origin = context.origin
        if origin is None:
            raise RewardError(f"reward {self.name!r} needs to know from which states the student predicted the samples")
        meant = origin.steps_left < self.config.last_steps
        rows = meant.nonzero()[:, 0]
        # Where there is none, one is asked for all the same: sharded weights are gathered on all processes or on none.
        asked = rows if len(rows) else rows.new_zeros(1)
        teacher, steps = origin.teacher_of(asked), self.config.num_inference_steps
        ends = follow_flow(teacher, context.schedule, origin.states[asked], origin.levels[asked], steps)
        gradient = torch.zeros_like(x_0)
        gradient[rows] = ends[: len(rows)].to(x_0) - x_0[rows]
        distance = gradient.float().square().flatten(1)
        scores = (-0.5 * distance.sum(1)).masked_fill(~meant, torch.nan)
        magnitude = residual_magnitude(x_0, context.renoise(x_0, batch.group_size).x_0(TEACHER))
        return RewardOutput(scores, gradient, magnitude, {"distance": distance.mean(1)})

    def score(self, batch: RewardBatch) -> Tensor:
        return self.field(batch).scores
