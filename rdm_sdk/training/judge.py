"""The rewards of a run: what they see of its models, and how they judge the student's samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import DiffusionContext, Origin, Times
from rdm_sdk.rewards.evaluate import start_rewards
from rdm_sdk.rewards.judging import nothing
from rdm_sdk.rewards.resolve import WeightedReward, carried_back
from rdm_sdk.rewards.tilt import tilted
from rdm_sdk.training.export import check_exportable
from rdm_sdk.training.method_settings import MethodSettings
from rdm_sdk.training.models import Models
from rdm_sdk.training.monitor import Monitor
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.randomness import Randomness
from rdm_sdk.training.start import check_start, load_start
from rdm_sdk.training.step_rules import judged_at_endpoints, judged_at_replay, uses_advantages, uses_fields
from rdm_sdk.types import Condition, Denoiser, Experience, RewardOutput, Samples, select

logger = logging.getLogger(__name__)


class Judge:
    """Evaluates rewards on samples of the run's student.

    Args:
        models: what model-aware rewards ask.
        rewards: all of the run's, with and without weight.
        settings: an `RDMConfig`, or any object with the same fields.
        monitor: takes every figure of the run down; a new one by default.
        processes: of a run on several devices.
        held_out: rewards that judge finished samples alone, in an evaluation.
    """

    def __init__(
        self,
        models: Models,
        rewards: Sequence[WeightedReward],
        settings: MethodSettings,
        monitor: Monitor | None = None,
        processes: Processes | None = None,
        held_out: Sequence[WeightedReward] = (),
    ) -> None:
        self.models, self.rewards, self.settings, self.held_out = models, rewards, settings, held_out
        self.monitor = Monitor() if monitor is None else monitor
        self.processes = Processes() if processes is None else processes
        self.uses_fields, self.uses_advantages = uses_fields(rewards), uses_advantages(rewards)
        self.randomness = Randomness(models.device, self.processes)
        """Where the random numbers of the run's steps come from."""
        self.step: int | None = None
        """The optimizer step that is under way, from 0."""
        self.watching = True
        """Whether rewards without weight judge what comes: they change nothing, so a step without a log can do so
        without them."""
        self._agrees = False

    @property
    def critics(self) -> list[tuple[WeightedReward, str]]:
        """The rewards that train a role, with the role."""
        return [(reward, role) for reward in self.rewards if (role := reward.capabilities.trains)]

    # ---- What rewards see ---------------------------------------------------------------------------------------

    def context(
        self,
        condition: Condition,
        steps: Tensor | None = None,
        trained: str | None = None,
        origin: Origin | None = None,
    ) -> DiffusionContext:
        """Return what model-aware rewards see of samples that the student made at steps k (int64 `[N]`).

        Graphs are kept for the role that is being `trained`, and the teacher's, to x_t, where gradients of rewards are
        carried back through it.
        """
        models, settings, carries_back = self.models, self.settings, carried_back(self.rewards)

        def denoiser(role: str) -> Denoiser:
            made = models.denoiser(role, condition, steps)
            return made if role == trained or (role == TEACHER and carries_back) else torch.no_grad()(made)

        (min_time, max_time), critic_times = self.times(steps)
        context = DiffusionContext(
            schedule=models.policy.schedule,
            denoiser=denoiser,
            min_time=min_time,
            max_time=max_time,
            spread=settings.spread,
            on_path=settings.matching == "path",
            critic_correction=settings.critic_correction,
            critic_times=critic_times,
            steps=steps if settings.steps_told else None,
            origin=origin,
            carries_back=carries_back,
            draws=self.randomness.draws,
        )
        return models.complete(context, condition)

    def times(self, steps: Tensor | None) -> tuple[Times, Times]:
        """Return between which times samples are re-noised for the student's update, and for the critics'.

        Where each step is matched in a separate range or on its path, samples of step k (int64 `[N]`) are re-noised to
        levels between the one that it leads to and its own: to no other do the steps behind it ever re-noise them
        (arXiv 2503.06674), and between the two the student's path lies. But for ranges the critics learn at all times,
        as in DMD2 (arXiv 2405.14867).
        """
        settings = self.settings
        if settings.matching not in ("range", "path") or steps is None:
            return (settings.min_time, settings.max_time), (0.0, 1.0)
        low, high = self.models.policy.times(steps)
        low = low.clamp_min(settings.min_time)
        high = torch.maximum(high.clamp_max(settings.max_time), low)
        return (low, high), (low, high) if settings.matching == "range" else (0.0, 1.0)

    def batch(self, samples: Samples, trained: str | None = None) -> RewardBatch:
        """Return samples as rewards see them, with fresh noise; `trained` as in `context`."""
        policy, condition = self.models.policy, samples.condition
        origin = Origin(
            samples.states,
            policy.levels(samples.steps),
            policy.num_steps - 1 - samples.steps,
            lambda rows: self.models.denoiser(TEACHER, select(condition, rows)),
        )
        return RewardBatch(
            latents=samples.x_0,
            prompts=samples.prompts,
            group_size=self.settings.num_generations,
            decode=self.models.to_images,
            columns=samples.columns,
            context=self.context(condition, samples.steps, trained, origin),
            weights=samples.weights,
            step=self.step,
        )

    def asked(self, rewards: Sequence[WeightedReward]) -> list[WeightedReward]:
        """Return those of some rewards that judge now: the ones with a weight, and all while `watching`."""
        return [reward for reward in rewards if reward.weight or self.watching]

    # ---- What they return ---------------------------------------------------------------------------------------

    def judge(self, experience: Experience) -> dict[str, RewardOutput]:
        """Evaluate every reward at an experience's x_0, except those that have scored its endpoints already."""
        left = [one for one in self.asked(judged_at_replay(self.rewards)) if one.label not in experience.scored]
        batch = self.batch(experience.samples)
        tilting = {reward.label: reward for reward in left if reward.route == "tilt" and reward.weight}
        if tilting:  # before a reward that is only watched asks for it, whose random numbers are put back
            batch.require_context("a tilt").renoise(batch.latents, batch.group_size)
        outputs = self.start(left, batch)()
        here = [label for label in tilting if label in outputs and not bool(outputs[label].scores.isnan().all())]
        scale, total = self.settings.scale_rewards, self.processes.total
        for label in self.processes.anywhere(here):
            if label in here:
                outputs[label] = tilted(outputs[label], batch, scale, total)
            else:  # other processes wait for this one: its part of the batch's statistics, or of a base shared out
                tilted(nothing(batch.latents, tilting[label].differentiated), batch, scale, total)
        return dict(experience.scored) | outputs

    def score_endpoints(self, endpoints: Samples) -> Answers:
        """Evaluate the rewards that act by their scores on the student's final samples; whoever reads first waits."""
        rewards = judged_at_endpoints(self.rewards)
        if self.settings.num_iterations == 1:  # later uses of a rollout have no other scores, and may be logged
            rewards = self.asked(rewards)
        return Answers([reward.label for reward in rewards], self.start(rewards, self.batch(endpoints)))

    def start(self, rewards: Sequence[WeightedReward], batch: RewardBatch) -> Callable[[], dict[str, RewardOutput]]:
        """Evaluate rewards on a batch; the function that is returned waits for their outputs and returns them.

        Those without weight are watched, and leave no trace in the random state.
        """
        started, names = [], ", ".join(reward.label for reward in rewards)
        before = self.processes.note(f"asking the rewards {names}")
        for counts in (True, False):
            chosen = [reward for reward in rewards if bool(reward.weight) == counts]
            if chosen:
                with self.undisturbed(*chosen), self.models.vae_at_hand():
                    evaluation = start_rewards(
                        {weighted.label: weighted.reward for weighted in chosen},
                        batch,
                        chunk_size=self.settings.reward_batch_size,
                        gradients_of=[reward.label for reward in chosen if counts and reward.differentiated],
                        **self.options,
                    )
                started.append(evaluation)
        self.processes.note(before)

        def collect() -> dict[str, RewardOutput]:
            outputs: dict[str, RewardOutput] = {}
            before = self.processes.note(f"waiting for the answers of the rewards {names}")
            for evaluation in started:
                result = evaluation.collect()
                outputs |= result.outputs
                self.monitor.spent["reward_calls"] += sum(result.shown[name] for name in result.outputs)
                self.monitor.evaluation(result, skips=self.settings.reward_on_error == "skip")
            self.processes.note(before)
            return outputs

        return collect

    @property
    def of_images(self) -> dict[str, Any]:
        """The rewards that can judge finished samples, by label; those that are held out come last."""
        everything = (*self.rewards, *self.held_out)
        return {one.label: one.reward for one in everything if not one.capabilities.needs_models}

    @property
    def options(self) -> dict[str, Any]:
        """How the settings let `evaluate_rewards` run."""
        settings = self.settings
        return {
            "device": settings.reward_device,
            "offload": settings.reward_offload,
            "on_error": settings.reward_on_error,
            # Watching stops no run.
            "may_sit_out": [one.label for one in (*self.rewards, *self.held_out) if not one.weight],
            "time_limit": settings.reward_timeout,
        }

    @contextmanager
    def undisturbed(self, *rewards: WeightedReward) -> Iterator[None]:
        """Run the block without a trace in the random state if none of the rewards counts: watching changes nothing."""
        if any(reward.weight for reward in rewards):
            yield
            return
        with self.randomness.undisturbed():
            yield

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Let all processes, which run the block together, go by what the first one's rewards say in an evaluation.

        A judge need not say the same to each, and on it hang rates, the best checkpoint, and when a run stops.
        """
        self._agrees = True
        try:
            yield
        finally:
            self._agrees = False

    def agreed(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of an evaluation that this process goes on by."""
        first: dict[str, float] = self.processes.gather(figures)[0] if self._agrees else figures
        return first

    def record(self, outputs: Mapping[str, RewardOutput]) -> None:
        """Take down what the rewards returned for a micro-batch."""
        for reward in self.rewards:
            if reward.label in outputs:
                self.monitor.reward(reward, outputs[reward.label], self.settings.num_generations)


class Answers(Mapping[str, RewardOutput]):
    """What rewards returned, by label, waited for when it is first read: until then asynchronous ones are at work.

    Those that were `asked` and skipped are missing in the end.
    """

    def __init__(self, asked: Collection[str], collect: Callable[[], dict[str, RewardOutput]]) -> None:
        self._asked, self._collect = asked, collect

    @cached_property
    def _outputs(self) -> dict[str, RewardOutput]:
        outputs = self._collect()
        del self._collect  # which holds decoded images
        return outputs

    def __contains__(self, label: object) -> bool:
        return label in self._asked and label in self._outputs  # nobody waits for what was not asked

    def __getitem__(self, label: str) -> RewardOutput:
        return self._outputs[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)


def add_run_roles(
    family: ModelFamily,
    configs: Mapping[str, LoraConfig | None],
    rewards: Sequence[WeightedReward],
    steps_told: int,
    start_from: str | None = None,
) -> None:
    """Add to a family the roles of a run, those that are modules of rewards among them, and warn of full copies.

    `configs` maps a role to its LoRA, or to None for a full copy of the base; `steps_told` is K, if critics are told
    the student's step, and 0 if not; `start_from` is the folder of a finished student whose weights the student gets.

    Raises:
        ModelError: the student's adapters could not be exported, or the finished student is another base's.
    """
    if start_from is not None:
        check_start(start_from, family)
    if configs.get(STUDENT) is not None:
        check_exportable(family)
    with torch.random.fork_rng(devices=[]):  # so that a head changes nothing about the student's initial weights
        heads = dict(reward_heads(rewards, family, steps_told))
    family.add_roles(configs, heads, steps_told)
    if start_from is not None:
        load_start(start_from, family)
    for role, network in family.roles.copies.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        logger.warning(
            f"{role!r} is a full copy of the base: {count:.3g} parameters, {16 * count / 2**30:.2f} GB in float32 "
            "with gradients and Adam's moments, beside the base; 'rdm-sdk plan' says what else the run takes"
        )


def reward_heads(
    rewards: Sequence[WeightedReward], family: ModelFamily, steps_told: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the trained roles that are modules of rewards, with the modules.

    `steps_told` is K, if critics are told the student's step, and 0 if not.
    """
    for weighted in rewards:
        role = weighted.capabilities.trains
        if role and weighted.capabilities.head:
            yield role, weighted.reward.make_head(family.feature_width, steps_told)
