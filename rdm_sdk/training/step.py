"""The method's step, for a loop and optimizers of your choice: rollouts, the critics' losses, the student's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdm_sdk.errors import RDMError
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.method.losses import pathwise_loss
from rdm_sdk.method.noise import per_sample
from rdm_sdk.method.objective import aggregate, combine, normalize, policy_loss, policy_pull
from rdm_sdk.method.sampling import replay_log_ratio
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.method_settings import MethodSettings
from rdm_sdk.training.monitor import mean_where
from rdm_sdk.training.rollouts import Rollouts, Window
from rdm_sdk.training.weighting import Weighting, make_weighting, state_of, weigh
from rdm_sdk.types import Experience, RewardOutput, read_all


@dataclass(frozen=True)
class StudentLoss:
    """What a micro-batch tells the student."""

    loss: Tensor
    """A scalar, differentiable in the student's parameters."""
    outputs: Mapping[str, RewardOutput]
    """What each reward returned; a reward that was skipped is missing."""
    pulls: Mapping[str, float]
    """Mean |g| of each reward's normalized, unweighted gradient at x_0."""


@dataclass(frozen=True)
class Advantages:
    """What the scores of a micro-batch's endpoints teach."""

    together: Tensor | None
    """The advantages `[N]` of all rewards at their weights; None if no weight is other than 0 for now."""
    alone: Mapping[str, Tensor]
    """Those that each reward would give at a weight of 1, if it were the only one; NaN where it does not apply."""


class DistillationStep:
    """One optimizer step of the method at a time, without optimizers: they are the caller's.

    A step is `begin`; per turn of the critics `critic_losses`, their backward passes, `end_critics` and the critics'
    optimizer; per micro-batch `student_loss` and its backward pass; `end` and the student's optimizer.

    Args:
        judge: the rewards, and the models that they ask; its monitor takes the step's figures down too.
        settings: an `RDMConfig`, or any object with the same fields.
        weighting: sets the rewards' weights from step to step; by default they are those of the rewards.
    """

    def __init__(self, judge: Judge, settings: MethodSettings, weighting: Weighting | None = None) -> None:
        self.models, self.judge, self.settings = judge.models, judge, settings
        self.monitor, self.processes = judge.monitor, judge.processes
        self.rollouts = Rollouts(judge, settings)
        self.targets = {reward.label: reward.weight for reward in judge.rewards}
        self.weighting = make_weighting("fixed") if weighting is None else weighting
        self.weights = weigh(self.weighting, self.targets, {}, 0)
        """What each reward weighs in this optimizer step."""
        state_of(self.weighting)  # so that one that cannot be kept is found here
        self._advantages: list[Advantages] = []
        self._losses: list[Tensor] = []
        self._has_field = False
        self._student_checked = self._waited = False

    def forget(self) -> None:
        """Drop what a step that failed, or was interrupted, has left behind; the random state is given back."""
        self.monitor.forget()
        self.judge.randomness.end()
        self.judge.step = None

    def begin(self, window: Window, step: int) -> None:
        """Roll the student out for the micro-batches of optimizer step `step` (from 0), or use rollouts again.

        It happens for all micro-batches together, as the critics' updates do, so that gradient accumulation does not
        change the two time scales.
        """
        self.judge.step = step
        self.processes.note(f"rolling the student out for optimizer step {step + 1}")
        self.judge.randomness.begin()
        self.rollouts.begin(window, step)
        self._advantages, self._losses = [], []

    # ---- Critics ------------------------------------------------------------------------------------------------

    def critic_losses(self, turn: int) -> Iterator[Tensor]:
        """Yield scalar losses of the critics on the student's samples, in their `turn`-th update before the student's.

        Each is to be back-propagated before the next is asked for. Without critics there are none.
        """
        if not self.judge.critics:
            return
        self.processes.note(f"training the critics, update {turn + 1} of the step")
        batches = self.rollouts.critic_samples(turn)
        for samples in batches:
            for reward, role in self.judge.critics:
                with self.judge.undisturbed(reward):
                    batch = self.judge.batch(samples, trained=role)
                    loss = reward.reward.training_loss(batch)
                    yield loss / len(batches)
                self.monitor.logged(reward.label, batch.logged or {})
                self.monitor.log(f"{reward.label}/critic_loss", loss)

    def end_critics(self) -> None:
        """Average and clip the critics' gradients, before their optimizer steps.

        Raises:
            RDMError: a gradient is not finite.
        """
        for reward, role in self.judge.critics:
            parameters = self.models.parameters_of(role)
            self.processes.average_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, self.settings.critic_max_grad_norm or torch.inf)
            if not bool(norm.isfinite()):
                raise RDMError(f"the critic's gradient norm is {norm.item()}; lower critic_learning_rate. {OTHERWISE}")
            self.monitor.log(f"{reward.label}/critic_grad_norm", norm)
        self.monitor.spent["critic_steps"] += bool(self.judge.critics)

    # ---- Student ------------------------------------------------------------------------------------------------

    def student_loss(self, position: int) -> StudentLoss:
        """Judge a micro-batch of the window by every reward, and return the student's loss.

        Raises:
            RDMError: there is nothing to learn from. That the loss is finite, `end` sees.
        """
        self.processes.note(f"computing the student's loss of micro-batch {position + 1}")
        experience, x_0 = self.rollouts.replay(position)
        outputs = self.judge.judge(experience)
        if self.judge.uses_advantages and not self._advantages:
            # Not before: rewards that are awaited have been at it since the rollouts, beside the critics and `dm`.
            self._advantages = self._normalize_scores()
        fields = normalize(outputs, self.settings.num_generations, self.settings.normalization)
        field = combine(fields, self.weights)
        self._has_field = field is not None
        counts, pulls = _pulls_of(fields, outputs)
        losses = [] if field is None else [self._pathwise(experience, x_0, field)]
        if self._advantages and experience.scored:
            policy, policy_pulls, transitions = self._policy(experience, x_0, self._advantages[position])
            losses, pulls = losses + policy, pulls | policy_pulls
        else:
            transitions = {}
        self.monitor.pulls({name: pull for name, pull in pulls.items() if counts[name]}, counts | transitions)
        if not outputs and len(self.judge.asked(self.judge.rewards)) == len(self.judge.rewards):
            raise RDMError("every reward was skipped, so there is nothing to learn from; the warnings above say why")
        # Every weight may be 0 for now: a cold start without distribution matching.
        loss = torch.stack(losses).sum() if losses else 0.0 * x_0.sum()
        self._losses.append(loss.detach())
        self.judge.record(outputs)
        return StudentLoss(loss, outputs, pulls)

    def _pathwise(self, experience: Experience, x_0: Tensor, field: Tensor) -> Tensor:
        """Return the loss that moves x_0 `[N, *x]` along a field."""
        weights = experience.weights
        if self.settings.matching != "mixture":
            weights = weights * self.models.policy.step_weights(experience.steps)
        loss = pathwise_loss(x_0, per_sample(weights, field) * field)
        self.monitor.log("loss/pathwise", loss)
        return loss

    def _normalize_scores(self) -> list[Advantages]:
        """Return the advantages of each micro-batch, from the scores of all of them and of all processes.

        Every process asks for the same sums, in the same order, whatever was skipped on it.
        """
        settings, experiences = self.settings, self.rollouts.experiences
        scores = {
            reward.label: torch.cat([_scores_of(experience, reward.label) for experience in experiences])
            for reward in self.judge.rewards
            if reward.route == "advantage"
        }

        def advantages(weights: Mapping[str, float]) -> Tensor | None:
            how = settings.scale_rewards, settings.multi_objective_aggregation
            return aggregate(scores, weights, settings.num_generations, *how, self.processes.total)

        # A reward that was skipped on every process must not add to the size of the sum.
        counts = self.processes.total(
            torch.stack([(~values.isnan()).sum().double() for values in scores.values()])
        ).tolist()
        applies = [label for label, count in zip(scores, counts, strict=True) if count]
        together = advantages({label: self.weights[label] if label in applies else 0.0 for label in scores})
        single = {label: advantages({other: float(other == label) for other in scores}) for label in scores}
        result, start = [], 0
        for experience in experiences:
            rows = slice(start, start := start + len(experience.weights))
            alone = {
                label: each[rows].masked_fill(output.scores.isnan(), torch.nan)
                for label, output in experience.scored.items()
                if (each := single[label]) is not None
            }
            result.append(Advantages(None if together is None else together[rows], alone))
        return result

    def _policy(
        self, experience: Experience, x_0: Tensor, advantages: Advantages
    ) -> tuple[list[Tensor], dict[str, float], dict[str, int]]:
        """Return the loss that makes good transitions likelier, if one counts, and each reward's pull over how many."""
        settings, policy = self.settings, self.models.policy
        rows = (experience.steps < policy.num_random_steps).nonzero()[:, 0]
        predicted, steps = x_0[rows], experience.steps[rows]
        log_ratios = replay_log_ratio(experience.rollout, predicted, rows, steps, policy, settings.ratio_reduction)
        dimensions = x_0[0].numel()
        averaged = settings.ratio_reduction == "mean"
        joint = log_ratios * dimensions if averaged else log_ratios
        alone = {name: values[rows] for name, values in advantages.alone.items()}
        pulls = policy_pull(joint, predicted, alone)
        counts = read_all([(~values.isnan()).sum() for values in alone.values()])
        transitions = {name: int(count) for name, count in zip(alone, counts, strict=True)}
        if advantages.together is None:
            return [], pulls, transitions
        result = policy_loss(
            log_ratios,
            advantages.together[rows],
            experience.weights[rows],
            settings.clip_range,
            1 if averaged else dimensions,
            len(x_0),
        )
        self.monitor.log("loss/policy", result.loss)
        self.monitor.log("ratio/clip_fraction", result.clipped, len(rows))
        return [result.loss], pulls, transitions

    def end(self, next_step: int) -> None:
        """Average and check the student's gradient, weigh the rewards for the next optimizer step, keep the rollouts.

        Called once after the backward passes of all micro-batches, before the student's optimizer steps.

        Raises:
            RDMError: a loss or the gradient is not finite, or no gradient comes where one was expected at first.
        """
        self.processes.note("ending the step")
        self.processes.average_gradients(self.models.parameters_of(STUDENT))
        self._check_student_gradient()
        self.monitor.weighting(self.weights, self.weighting)
        statistics = self.monitor.step_statistics(self.targets, self.processes, self.models.device)
        self.weights = weigh(self.weighting, self.targets, statistics, next_step)
        self.rollouts.keep()
        self.judge.randomness.end()
        self.judge.step = None

    def _check_student_gradient(self) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.models.parameters_of(STUDENT) if p.grad is not None])
        size, *losses = read_all([norm, *self._losses])
        for loss in losses:
            if not math.isfinite(loss):
                raise RDMError(
                    f"the student's loss is {loss}; lower the learning rates or look at log_images. {OTHERWISE}"
                )
        if not math.isfinite(size):
            raise RDMError(f"the student's gradient norm is {size}; lower learning_rate. {OTHERWISE}")
        if self._has_field and not self._student_checked:
            if size == 0 and self.judge.critics and not self._waited:
                self._waited = True  # their rate is 0 in a warmup's first step, where critics are the teacher yet
            elif size == 0:
                raise RDMError(
                    "no gradient reaches the student: is a differentiable reward constant, or its graph cut?"
                )
            self._student_checked = size != 0


def _pulls_of(
    fields: Mapping[str, Tensor], outputs: Mapping[str, RewardOutput]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return to how many samples each reward applies, and the mean |g| of each field `[N, *x]` over them."""
    applies = {name: ~output.scores.isnan() for name, output in outputs.items()}
    counts = [rows.sum() for rows in applies.values()]
    pulls = [mean_where(field.abs(), applies[name]) for name, field in fields.items()]
    values = read_all(counts + pulls)
    known = {name: int(count) for name, count in zip(applies, values, strict=False)}
    return known, dict(zip(fields, values[len(counts) :], strict=True))


def _scores_of(experience: Experience, label: str) -> Tensor:
    """Return a reward's scores `[N]` of the endpoints, NaN where it was skipped."""
    if label in experience.scored:
        return experience.scored[label].scores
    return torch.full_like(experience.weights, torch.nan)


OTHERWISE = (
    "If the rates are not to blame, torch.autograd.set_detect_anomaly(True) names the operation where it began; for "
    "ScaledDotProductCudnnAttentionBackward0, torch.backends.cuda.enable_cudnn_sdp(False) is the remedy"
)
"""What to do about NaN. cuDNN's attention, PyTorch's first choice on Hopper cards, returned NaN gradients for a tiny
FLUX (H200, PyTorch 2.11), as it is known to do with some masks (PyTorch's issue 196678)."""
