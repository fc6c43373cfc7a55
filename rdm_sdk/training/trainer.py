"""`RDMTrainer`: a `transformers.Trainer` whose step is the method, readable from top to bottom."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from rdm_sdk.errors import ConfigError, RDMError
from rdm_sdk.families.load import load_adapter
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.method.draws import draw_steps
from rdm_sdk.method.importance import truncated_weights
from rdm_sdk.method.losses import pathwise_loss
from rdm_sdk.method.noise import per_sample
from rdm_sdk.method.objective import Signal, Term, combine, normalize, policy_loss, policy_pull
from rdm_sdk.method.sampling import StudentOf, plan_steps, redraw, replay_log_ratio, rollout, state_log_ratio
from rdm_sdk.rewards.resolve import RewardFuncs
from rdm_sdk.rewards.routes import load_routed
from rdm_sdk.rewards.tilt import tilted
from rdm_sdk.training.checkpoint import RunState
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import load_prompts
from rdm_sdk.training.export import StudentInfo, non_default_settings
from rdm_sdk.training.judging import JudgingTrainer, reward_heads
from rdm_sdk.training.validation import check_run, check_same_plugins, role_configs
from rdm_sdk.training.weighting import Weighting, make_weighting, weigh
from rdm_sdk.types import Condition, Experience, RewardOutput, Samples, select, select_steps

logger = logging.getLogger(__name__)


class RDMTrainer(JudgingTrainer):
    """Distill a diffusion model into a few-step LoRA student with distribution matching as one reward among equals.

    Args:
        model: the base: a hub id, a local path, a loaded diffusers pipeline, or a `ModelAdapter`.
        reward_funcs: what to maximize: a spec such as "dm + 0.5*legibility", a callable
            `f(images=, prompts=, **columns) -> list[float | None]`, a `Reward`, or a list of them; None is "dm".
        args: an `RDMConfig`.
        train_dataset: prompts: a `datasets.Dataset` with a `prompt` column, a list of strings, or a text file's path.
        eval_dataset: prompts for `evaluate`, in the same forms.
        processing_class: handed to `Trainer` as it is; the method itself needs none.
        callbacks: `transformers` callbacks.
        optimizers: must be left alone: the weights that are trained are made in here. `args` names optimizer and
            schedule (`optim`, `learning_rate`, `critic_learning_rate`, ...).
        peft_config: LoRA of the student; rank 16 and alpha 16 on the family's usual layers by default. None where
            `args.student_weights` is "full".
        fake_peft_config: LoRA of the critics; the student's by default. None where `args.critic_weights` is "full".
        weighting: a `Weighting` of your own, in place of the one that `args.weighting` names.

    Raises:
        ConfigError, DataError, RewardError, ModelError: something cannot work; raised here, before any training, and
            before the base is loaded wherever that is possible.
    """

    def __init__(
        self,
        model: object,
        reward_funcs: RewardFuncs = None,
        args: RDMConfig | None = None,
        train_dataset: object = None,
        eval_dataset: object = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
        *,
        fake_peft_config: LoraConfig | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        args = RDMConfig() if args is None else args
        if not isinstance(args, RDMConfig):
            raise ConfigError(f"args must be an RDMConfig; got {type(args).__name__}")
        if tuple(optimizers) != (None, None):
            raise ConfigError(
                "optimizers cannot be given: the weights of student and critics are made in this constructor, so that "
                "no optimizer made before could hold them. Set optim, learning_rate, lr_scheduler_type and their "
                "critic_* in RDMConfig, or override create_optimizer()"
            )
        train_dataset = None if train_dataset is None else load_prompts(train_dataset)
        eval_dataset = None if eval_dataset is None else load_prompts(eval_dataset, "eval_dataset")
        self.rewards = load_routed(reward_funcs, args.reward_weights, args.reward_route)
        check_run(args, self.rewards, {"train_dataset": train_dataset, "eval_dataset": eval_dataset}, weighting)
        roles = role_configs(args, self.rewards, peft_config, fake_peft_config)

        adapter = load_adapter(
            model,
            torch.bfloat16 if args.bf16 else torch.float32,
            args.quantization,
            max_sequence_length=args.max_sequence_length,
        )
        set_seed(args.seed)  # the adapters' initial weights are part of the run
        with torch.random.fork_rng(devices=[]):  # so that a head changes nothing about the student's initial weights
            heads = dict(reward_heads(self.rewards, adapter, args.steps_told))
        adapter.add_roles(roles, heads, args.steps_told)
        for role, network in adapter.roles.copies.items():
            count = sum(parameter.numel() for parameter in network.parameters())
            logger.warning(
                f"{role!r} is a full copy of the base: {count:.3g} parameters, {16 * count / 2**30:.2f} GB in float32 "
                "with gradients and Adam's moments, beside the base; 'rdm-sdk plan' says what else the run takes"
            )
        self._window: list[dict[str, Any]] = []
        self._experiences: list[Experience] = []
        self._stored: deque[list[Experience]] = deque(maxlen=args.steps_per_generation)
        self._position = 0
        self.targets = {own.label: own.weight for own in self.rewards}
        self.weighting = make_weighting(args.weighting) if weighting is None else weighting
        self.weights = weigh(self.weighting, self.targets, {}, 0)
        self._student_checked = False
        super().__init__(
            adapter,
            args,
            callbacks,
            self.rewards,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        check_same_plugins(self.accelerator.num_processes)

    # ---- The step -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Remember the micro-batches of the coming optimizer step: the critic learns from all of them first."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = list(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out, train the critics, judge by every reward, weigh, and back-propagate the student's loss.

        Rollouts and critic updates happen once per optimizer step, for all its micro-batches together, so that
        gradient accumulation does not change the two time scales.
        """
        args = self.args
        model.train()
        if self._window:
            window, self._window, self._position = self._window, [], 0
            self._experiences = self._reuse(window) or [self._collect(batch) for batch in window]
            for turn in range(args.critic_steps):
                self._train_critics(self._critic_samples(window, turn))
            if self.critic_optimizer is not None:
                self.critic_optimizer.next_rate()

        experience = self._experiences[self._position]
        x_0 = self._replay(experience)
        experience = self._experiences[self._position] = replace(experience, x_0=x_0.detach())
        self._position += 1
        outputs = self._judge(experience)
        terms = normalize(
            outputs, args.num_generations, args.normalization, args.scale_rewards, args.multi_objective_aggregation
        )
        signal = combine(terms, self.weights, args.num_generations, args.scale_rewards)
        loss = self._student_loss(experience, x_0, signal, terms)
        if not bool(loss.isfinite()):
            raise RDMError(
                f"the student's loss is {loss.item()}; lower the learning rates or look at log_images. {OTHERWISE}"
            )
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        self.record(outputs)
        if self.accelerator.sync_gradients:
            self.average_gradients(self.parameters_of(STUDENT))
            self._check_student_gradient(expected=signal.field is not None)
            self._weigh_next()
            if experience.use + 1 < args.num_iterations:
                self._stored.append(self._experiences)
        return loss.detach() / self.current_gradient_accumulation_steps

    def _collect(self, inputs: dict[str, Any]) -> Experience:
        """Roll the student out for a micro-batch of prompts; score the endpoints if a reward acts by its scores."""
        if not self.has(pathwise=False):
            return self._roll_out(inputs, to_the_end=self.args.critic_rollouts == "shared")
        experience = self._roll_out(inputs, to_the_end=True)
        scored = [own for own in self.rewards if not own.pathwise]
        endpoints = experience.samples_at(torch.full_like(experience.steps, self.args.num_inference_steps - 1))
        return replace(experience, scored=self.score(scored, self.batch(endpoints)))

    def _roll_out(self, inputs: dict[str, Any], to_the_end: bool = False) -> Experience:
        """Roll the student out for prompts, group-major, as far as their first use goes or to the end."""
        args, prompts = self.args, inputs["prompts"]
        condition = self.encode(prompts)
        noise = torch.randn(len(prompts), *self.step_shape(), device=args.device)
        # A trajectory stopped at the last step has no density, so it is of no use where only scores teach.
        last = args.num_inference_steps if self.has(pathwise=True) else args.num_random_steps
        groups = len(prompts) // args.num_generations
        plan = plan_steps(
            draw_steps(args.spread, groups, args.num_generations, last, noise.device), args.num_iterations, last
        )
        depths = torch.full_like(plan[0], args.num_inference_steps) if to_the_end else plan[0] + 1
        done = rollout(self._student_of(condition), noise, depths, self.policy)
        self.spent["rollouts"] += len(prompts)
        weights = torch.ones(len(prompts), device=noise.device)
        x_0 = select_steps(done.x_0, plan[0])
        return Experience(prompts, inputs["columns"], condition, done, plan, 0, x_0, weights, {})

    def _reuse(self, window: Sequence[dict[str, Any]]) -> list[Experience] | None:
        """Return the stored rollouts of these prompts for one more use, or None if there are none or they are stale.

        The student, which has moved on since, predicts x_0 anew before the critics learn from it; the graphs of these
        predictions are kept for the student's own update.
        """
        args, prompts = self.args, [batch["prompts"] for batch in window]
        if args.num_iterations == 1:
            return None
        at = next((i for i, kept in enumerate(self._stored) if [own.prompts for own in kept] == prompts), None)
        # Processes have prompts of their own; where one cannot go on, none does, or they would wait for each other.
        found: list[int | None] = gather_object([at])
        if at is None or None in found:
            return None
        stored = self._stored[at]
        del self._stored[at]
        if stored[0].use + 1 >= len(stored[0].plan):
            return None
        experiences, log_ratios = [], []
        for own, batch in zip(stored, window, strict=True):
            own = replace(own, use=own.use + 1, columns=batch["columns"], condition=self.encode(own.prompts))
            if args.importance_sampling_correction:
                student = self._student_of(own.condition)
                log_ratios.append(state_log_ratio(student, own.rollout, own.steps, self.policy, args.ratio_reduction))
                own = replace(own, weights=truncated_weights(log_ratios[-1], args.importance_sampling_cap))
            experiences.append(own)
        share = self.effective_share(torch.cat(log_ratios).exp()) if log_ratios else 1.0
        if not share >= args.min_effective_sample_size:  # nor if it is NaN
            self.monitor.log("ratio/stopped", 1.0)
            return None
        return [replace(own, x_0=self._replay(own)) for own in experiences]

    def _critic_samples(self, window: Sequence[dict[str, Any]], turn: int) -> list[Samples]:
        """Return what the critics learn from in one of their updates before the student's, the `turn`-th.

        New rollouts, as in DMD2, or the student's own, at another step of each trajectory every time: a rollout of 64
        then holds 64 K samples. In a later use, only what the student has predicted anew is its present self's.
        """
        if self.args.critic_rollouts == "fresh":
            return [self._roll_out(batch).samples for batch in window]
        last = self.args.num_inference_steps
        return [own.samples if own.use else own.samples_at((own.steps + 1 + turn) % last) for own in self._experiences]

    def _train_critics(self, samples: Sequence[Samples]) -> None:
        """One optimizer step for every trainable reward, on the student's latest samples."""
        critics = [(own, role) for own in self.rewards if (role := own.reward.capabilities.trains)]
        if not critics or self.critic_optimizer is None:
            return
        for some in samples:
            for own, role in critics:
                with self.aside(own):
                    loss = own.reward.training_loss(self.batch(some, trained=role))
                    (loss / len(samples)).backward()
                self.monitor.log(f"loss/{own.label}", loss)
        for own, role in critics:
            self.average_gradients(self.parameters_of(role))
            norm = nn.utils.clip_grad_norm_(self.parameters_of(role), self.args.critic_max_grad_norm or torch.inf)
            if not bool(norm.isfinite()):
                raise RDMError(f"the critic's gradient norm is {norm.item()}; lower critic_learning_rate. {OTHERWISE}")
            self.monitor.log(f"{own.label}/critic_grad_norm", norm)
        self.critic_optimizer.step()
        self.spent["critic_steps"] += 1

    def _replay(self, experience: Experience) -> Tensor:
        """Return the student's x_0 `[N, *x]` at this use's states, with gradients."""
        if experience.x_0.requires_grad:
            return experience.x_0
        student = self.denoiser(STUDENT, experience.condition)
        x_0 = student(experience.states, self.policy.levels(experience.steps))
        if experience.use == 0:
            self._check_first_ratio(experience, x_0.detach())
        elif not self.has(pathwise=False):
            # No score hangs on how these trajectories ended, so the states that later uses start from are kept fresh.
            redraw(experience.rollout, x_0.detach(), experience.steps, self.policy)
        return x_0

    def _judge(self, experience: Experience) -> dict[str, RewardOutput]:
        """Evaluate every reward at the replayed x_0; what scored the endpoints has spoken already."""
        left = [own for own in self.rewards if own.label not in experience.scored]
        left = [own for own in left if own.pathwise or not self.has(pathwise=False)]
        batch = self.batch(experience.samples)
        outputs = self.score(left, batch)
        for own in left:
            if own.tilts and own.weight and own.label in outputs:
                outputs[own.label] = tilted(outputs[own.label], batch, self.args.scale_rewards)
        return dict(experience.scored) | outputs

    def _student_loss(self, experience: Experience, x_0: Tensor, signal: Signal, terms: Mapping[str, Term]) -> Tensor:
        """Move x_0 along the field, make good transitions likelier, and note how hard each reward pulls."""
        args, losses = self.args, []
        pulls = {name: float(term.field.abs().mean()) for name, term in terms.items() if term.field is not None}
        if signal.field is not None:
            weighted = per_sample(experience.weights, signal.field) * signal.field
            losses.append(pathwise_loss(x_0, weighted))
            self.monitor.log("loss/pathwise", losses[-1])
        scored = {name: term.advantage for name, term in terms.items() if term.advantage is not None}
        if scored and self.has(pathwise=False):
            rows = (experience.steps < args.num_random_steps).nonzero()[:, 0]
            predicted, steps = x_0[rows], experience.steps[rows]
            log_ratios = replay_log_ratio(experience.rollout, predicted, rows, steps, self.policy, args.ratio_reduction)
            dimensions = x_0[0].numel()
            averaged = args.ratio_reduction == "mean"
            joint = log_ratios * dimensions if averaged else log_ratios
            pulls |= policy_pull(joint, predicted, {name: advantage[rows] for name, advantage in scored.items()})
            if signal.advantage is not None:
                policy = policy_loss(
                    log_ratios,
                    signal.advantage[rows],
                    experience.weights[rows],
                    args.clip_range,
                    1 if averaged else dimensions,
                    len(x_0),
                )
                losses.append(policy.loss)
                self.monitor.log("loss/policy", policy.loss)
                self.monitor.log("ratio/clip_fraction", policy.clipped)
        self.monitor.pulls(pulls)
        if losses:
            return torch.stack(losses).sum()
        if terms:
            return 0.0 * x_0.sum()  # every weight is 0 for now: a cold start without distribution matching
        raise RDMError("every reward was skipped, so there is nothing to learn from; the warnings above say why")

    # ---- What the step is made of -------------------------------------------------------------------------------

    def _student_of(self, condition: Condition) -> StudentOf:
        return lambda rows: self.denoiser(STUDENT, select(condition, rows))

    def _check_first_ratio(self, experience: Experience, x_0: Tensor) -> None:
        """Raise unless the replay repeats its rollout, so that the first ratio is 1; then make it exactly 1.

        The two passes see other batches, so their last bits may differ; the replay's prediction takes the place of the
        rollout's.
        """
        done, rows = experience.rollout, (experience.steps < self.args.num_random_steps).nonzero()[:, 0]
        if len(rows):
            ratio = replay_log_ratio(done, x_0[rows], rows, experience.steps[rows], self.policy, "mean").abs().max()
            bound = FIRST_RATIO_TOLERANCE[self.args.bf16]
            if not bool(ratio <= bound):
                raise RDMError(
                    f"the replay of a rollout does not repeat it: the first log-ratio per dimension is {ratio:.3g}, "
                    f"not 0 (bound {bound}). Something in the student is random, such as dropout"
                )
        done.x_0[experience.steps, torch.arange(len(x_0), device=x_0.device)] = x_0

    def _weigh_next(self) -> None:
        """Let the weighting strategy look at this optimizer step and set the weights of the next."""
        self.monitor.weighting(self.weights, self.weighting)
        statistics = self.monitor.step_statistics(self.targets, self.accelerator)
        self.weights = weigh(self.weighting, self.targets, statistics, self.state.global_step + 1)

    def _check_student_gradient(self, expected: bool) -> None:
        """Raise if the student's gradient would spoil its weights, or if none comes where one was expected at first."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters_of(STUDENT) if p.grad is not None])
        if not bool(norm.isfinite()):
            raise RDMError(f"the student's gradient norm is {norm.item()}; lower learning_rate. {OTHERWISE}")
        if expected and not self._student_checked:
            if norm == 0:
                raise RDMError("no gradient reaches the student: are all reward weights 0, or all rewards constant?")
            self._student_checked = True

    # ---- State --------------------------------------------------------------------------------------------------

    def student_info(self) -> StudentInfo:
        args = self.args
        stochastic = args.sampler == "renoise"
        settings = non_default_settings(args)
        return StudentInfo(
            args.num_inference_steps, self.shift, stochastic, args.guidance_scale, self.rewards, settings
        )

    def stored_experiences(self) -> list[list[Experience]]:
        return list(self._stored)

    def capture_state(self) -> RunState:
        return RunState(
            fingerprint=self.fingerprint,
            rewards=[own.term.reference + own.route_note for own in self.rewards],
            adapters={role: self.roles.describe(role) for role in self.roles.trainable_roles},
            forwards=dict(self.roles.forwards),
            costs=dict(self.spent),
            stored_rollouts=bool(self._stored),
            weights=self.weights,
            weighting=dict(self.weighting.state_dict()),
            ema_steps=None if self.ema is None else self.ema.optimization_step,
        )

    def restore_state(self, state: RunState, experiences: list[list[Experience]]) -> None:
        self.roles.forwards.clear()
        self.roles.forwards.update(state.forwards)
        self.spent = Counter(state.costs)
        self._stored.clear()
        self._stored.extend(experiences)
        self.weights = dict(state.weights)
        self.weighting.load_state_dict(state.weighting)


OTHERWISE = (
    "If the rates are not to blame, torch.autograd.set_detect_anomaly(True) names the operation where it began; for "
    "ScaledDotProductCudnnAttentionBackward0, torch.backends.cuda.enable_cudnn_sdp(False) is the remedy"
)
"""What to do about NaN. cuDNN's attention, PyTorch's first choice on Hopper cards, returned NaN gradients for a tiny
FLUX (H200, PyTorch 2.11), as it is known to do with some masks (PyTorch's issue 196678)."""
FIRST_RATIO_TOLERANCE = {False: 1e-3, True: 0.05}
"""How far a first log-ratio per dimension may be from 0, in float32 and in bf16."""
