"""The rewards of a run: what they see of its models, and how they judge the student's samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import DiffusionContext, Times
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.resolve import WeightedReward, carried_back
from rdm_sdk.rewards.tilt import tilted
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.monitor import Monitor
from rdm_sdk.training.order import acts, judged_at_endpoints, judged_at_replay
from rdm_sdk.training.settings import MethodSettings
from rdm_sdk.types import Condition, Denoiser, Experience, RewardOutput, Samples

logger = logging.getLogger(__name__)


class Judge:
    """Evaluates rewards on samples of the run's student.

    Args:
        models: what model-aware rewards ask.
        rewards: all of the run's, with and without weight.
        settings: an `RDMConfig`, or any object with the same fields.
        monitor: takes every figure of the run down; a new one by default.
    """

    def __init__(
        self,
        models: RunModels,
        rewards: Sequence[WeightedReward],
        settings: MethodSettings,
        monitor: Monitor | None = None,
    ) -> None:
        self.models, self.rewards, self.settings = models, rewards, settings
        self.monitor = Monitor() if monitor is None else monitor

    @property
    def critics(self) -> list[tuple[WeightedReward, str]]:
        """The rewards that train a role, with the role."""
        return [(own, role) for own in self.rewards if (role := own.reward.capabilities.trains)]

    def has(self, pathwise: bool) -> bool:
        """Whether a reward that counts acts by its gradient (or by its scores)."""
        return acts(self.rewards, pathwise)

    # ---- What rewards see ---------------------------------------------------------------------------------------

    def context(
        self, condition: Condition, steps: Tensor | None = None, trained: str | None = None
    ) -> DiffusionContext:
        """Return what model-aware rewards see of samples that the student made at steps k (int64 `[N]`).

        Graphs are kept for the role that is being `trained`, and the teacher's, to x_t, where gradients of rewards are
        carried back through it.
        """
        models, settings, carries_back = self.models, self.settings, carried_back(self.rewards)

        def denoiser(role: str) -> Denoiser:
            made = models.denoiser(role, condition, steps)
            return made if role == trained or (role == TEACHER and carries_back) else torch.no_grad()(made)

        def teacher_pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(carries_back):
                return models.teacher_pair(condition)(x_t, sigma)

        def unprompted(x_t: Tensor, sigma: Tensor) -> Tensor:
            with torch.no_grad():
                blank = models.encode([None] * len(x_t))
                return models.family.denoiser(models.roles, TEACHER, blank)(x_t, sigma)

        times, critic_times = self.times(steps)
        return DiffusionContext(
            models.family.schedule,
            denoiser,
            *times,
            settings.num_draws,
            settings.spread,
            settings.critic_correction,
            models.guide if models.guided else None,
            teacher_pair,
            models.family.features(models.roles, TEACHER, condition),
            models.family.encode_images,
            unprompted,
            critic_times,
            steps if settings.steps_told else None,
            carries_back,
        )

    def times(self, steps: Tensor | None) -> tuple[Times, Times]:
        """Return between which times samples are re-noised for the student's update, and for the critics'.

        Where each step is matched in a range of its own, samples of step k (int64 `[N]`) are re-noised to levels
        between the one that it leads to and its own: to no other do the steps behind it ever re-noise them (arXiv
        2503.06674). Otherwise the critics learn at all times, as in DMD2 (arXiv 2405.14867).
        """
        settings = self.settings
        if settings.matching != "range" or steps is None:
            return (settings.min_time, settings.max_time), (0.0, 1.0)
        low, high = self.models.policy.times(steps)
        low = low.clamp_min(settings.min_time)
        high = torch.maximum(high.clamp_max(settings.max_time), low)
        return (low, high), (low, high)

    def batch(self, samples: Samples, trained: str | None = None) -> RewardBatch:
        """Return samples as rewards see them, with fresh renoising draws; `trained` as in `context`."""
        return RewardBatch(
            samples.x_0,
            samples.prompts,
            self.settings.num_generations,
            self.models.family.decode,
            samples.columns,
            self.context(samples.condition, samples.steps, trained),
            samples.weights,
        )

    # ---- What they return ---------------------------------------------------------------------------------------

    def judge(self, experience: Experience) -> dict[str, RewardOutput]:
        """Evaluate every reward at an experience's x_0, except those that have scored its endpoints already."""
        left = [own for own in judged_at_replay(self.rewards) if own.label not in experience.scored]
        batch = self.batch(experience.samples)
        outputs = self.score(left, batch)
        for own in left:
            if own.tilts and own.weight and own.label in outputs:
                outputs[own.label] = tilted(outputs[own.label], batch, self.settings.scale_rewards)
        return dict(experience.scored) | outputs

    def score_endpoints(self, endpoints: Samples) -> dict[str, RewardOutput]:
        """Evaluate the rewards that act by their scores on the student's final samples."""
        return self.score(judged_at_endpoints(self.rewards), self.batch(endpoints))

    def score(self, rewards: Sequence[WeightedReward], batch: RewardBatch) -> dict[str, RewardOutput]:
        """Evaluate rewards on a batch; those without weight are watched, and leave no trace in the random state."""
        outputs: dict[str, RewardOutput] = {}
        for counts in (True, False):
            chosen = [own for own in rewards if bool(own.weight) == counts]
            if chosen:
                with self.aside(*chosen), self.models.vae_at_hand():
                    graded = [own.label for own in chosen if counts and own.pathwise]
                    result = evaluate_rewards(
                        {own.label: own.reward for own in chosen},
                        batch,
                        chunk_size=self.settings.reward_batch_size,
                        gradients_of=graded,
                        **self._options,
                    )
                outputs |= result.outputs
                self.monitor.spent["reward_calls"] += len(result.outputs) * len(batch)
                self.monitor.evaluation(result, skips=self.settings.reward_on_error == "skip")
        return outputs

    def score_finished(
        self, prompts: Sequence[str], columns: Mapping[str, list[object]], size: int
    ) -> dict[str, RewardOutput]:
        """Sample the student for prompts, one each, and score the samples by every reward that needs no models.

        Where a reward compares within groups, every prompt (and its columns) is repeated for a group. `size` samples
        are made and judged at a time.
        """
        judges = self.of_images
        in_groups = any(reward.capabilities.scope == "group" for reward in judges.values())
        group = self.settings.num_generations if in_groups else 1
        repeated = [prompt for prompt in prompts for _ in range(group)]
        entries = {name: [value for value in values for _ in range(group)] for name, values in columns.items()}
        latents = [
            self.models.sample_latents(repeated[start : start + size]) for start in range(0, len(repeated), size)
        ]
        batch = RewardBatch(torch.cat(latents), repeated, group, self.models.family.decode, entries)
        with self.models.vae_at_hand():
            return evaluate_rewards(judges, batch, chunk_size=size, gradients_of=(), **self._options).outputs

    def look(self, prompts: Sequence[str]) -> list[tuple[str, Tensor]]:
        """Return rows of pictures with labels: student x_0, and what teacher and critics make of it at sigma 0.6.

        A row holds the prompts' images `[N, 3, H, W]` in [0, 1].
        """
        models = self.models
        latents = models.sample_latents(prompts)
        sigma = torch.full((len(latents),), 0.6, device=latents.device)
        last = torch.full((len(prompts),), models.policy.num_steps - 1, device=latents.device)
        context = self.context(models.encode(prompts), last)
        x_t = context.add_noise(latents, sigma)
        critics = [role for role in models.roles.denoising_roles if role != STUDENT]
        labels = ["student x_0", *(f"{role} x_0\nfrom sigma 0.6" for role in (TEACHER, *critics))]
        rows = [latents, *(context.denoiser(role)(x_t, sigma) for role in (TEACHER, *critics))]
        return list(zip(labels, models.decode(rows), strict=True))

    @property
    def of_images(self) -> dict[str, Any]:
        """The rewards that can judge finished samples, by label."""
        return {own.label: own.reward for own in self.rewards if not own.reward.capabilities.needs_models}

    @property
    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "device": settings.reward_device,
            "offload": settings.reward_offload,
            "on_error": settings.reward_on_error,
        }

    @contextmanager
    def aside(self, *rewards: WeightedReward) -> Iterator[None]:
        """Run the block without a trace in the random state if none of the rewards counts: watching changes nothing."""
        if any(own.weight for own in rewards):
            yield
            return
        with self.models.forked():
            yield

    def record(self, outputs: Mapping[str, RewardOutput]) -> None:
        """Take down what the rewards returned for a micro-batch."""
        for own in self.rewards:
            if own.label in outputs:
                self.monitor.reward(own, outputs[own.label], self.settings.num_generations)


def add_run_roles(
    family: ModelFamily,
    configs: Mapping[str, LoraConfig | None],
    rewards: Sequence[WeightedReward],
    steps_told: int,
) -> None:
    """Add to a family the roles of a run, those that are rewards' own modules among them, and warn of full copies.

    Args:
        configs: role to its LoRA, or to None for a full copy of the base.
        rewards: some of which may bring a module to train.
        steps_told: K, if critics are told the student's step, and 0 if not.
    """
    with torch.random.fork_rng(devices=[]):  # so that a head changes nothing about the student's initial weights
        heads = dict(reward_heads(rewards, family, steps_told))
    family.add_roles(configs, heads, steps_told)
    for role, network in family.roles.copies.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        logger.warning(
            f"{role!r} is a full copy of the base: {count:.3g} parameters, {16 * count / 2**30:.2f} GB in float32 "
            "with gradients and Adam's moments, beside the base; 'rdm-sdk plan' says what else the run takes"
        )


def reward_heads(
    rewards: Sequence[WeightedReward], family: ModelFamily, steps_told: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the trained roles that are modules of their own, with the modules.

    `steps_told` is K, if critics are told the student's step, and 0 if not.
    """
    for own in rewards:
        role = own.reward.capabilities.trains
        if role and own.reward.capabilities.head:
            yield role, own.reward.make_head(family.feature_width, steps_told)
