"""`RDMTrainer`: a `transformers.Trainer` whose step is the method, readable from top to bottom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from rdm_sdk.checkpoint import RunState
from rdm_sdk.config import RDMConfig
from rdm_sdk.core.importance import importance_ratio
from rdm_sdk.core.losses import clipped_surrogate, pathwise_loss
from rdm_sdk.core.transitions import log_probability
from rdm_sdk.data import collate, load_prompts
from rdm_sdk.errors import ConfigError, DataError, RDMError
from rdm_sdk.export import STUDENT, StudentInfo, non_default_settings
from rdm_sdk.hosting import RoleTrainer, add_roles
from rdm_sdk.models.load import load_adapter
from rdm_sdk.models.roles import TEACHER, check_lora_config, describe_lora
from rdm_sdk.objective import Signal, combine, zero_std_share
from rdm_sdk.report import image_grid
from rdm_sdk.requirements import check_run, check_same_plugins, critic_roles
from rdm_sdk.rewards.base import DiffusionContext, Reward, RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.resolve import RewardFuncs, resolve_rewards
from rdm_sdk.sampling import draw_steps, rollout, transition_to
from rdm_sdk.types import Condition, Denoiser, Experience, RewardOutput, select

logger = logging.get_logger(__name__)


class RDMTrainer(RoleTrainer):
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
        optimizers: an optimizer over the parameters of all trainable roles and a scheduler, as in `Trainer`.
        peft_config: LoRA of the student; rank 16 and alpha 16 on the family's usual layers by default.
        fake_peft_config: LoRA of the critic; the student's by default.

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
    ) -> None:
        args = RDMConfig() if args is None else args
        if not isinstance(args, RDMConfig):
            raise ConfigError(f"args must be an RDMConfig; got {type(args).__name__}")
        train_dataset = None if train_dataset is None else load_prompts(train_dataset)
        eval_dataset = None if eval_dataset is None else load_prompts(eval_dataset, "eval_dataset")
        self.rewards = resolve_rewards(reward_funcs, args.reward_weights)
        check_run(args, self.rewards, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        for argument, lora in (("peft_config", peft_config), ("fake_peft_config", fake_peft_config)):
            if lora is not None:
                check_lora_config(lora, argument)

        adapter = load_adapter(
            model, torch.bfloat16 if args.bf16 else torch.float32, max_sequence_length=args.max_sequence_length
        )
        set_seed(args.seed)  # the adapters' initial weights are part of the run
        student = peft_config or LoraConfig(r=16, lora_alpha=16)
        add_roles(adapter, {STUDENT: student} | dict.fromkeys(critic_roles(self.rewards), fake_peft_config or student))
        self._window: list[dict[str, Any]] = []
        self._experiences: list[Experience] = []
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._critic_steps = self._reward_calls = 0
        self._student_checked = False
        super().__init__(
            adapter,
            args,
            callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=optimizers,
        )
        check_same_plugins(self.accelerator.num_processes)

    # ---- The step -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Remember the micro-batches of the coming optimizer step: the critic learns from all of them first."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = list(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out, train the critic, judge by every reward, and back-propagate the student's loss.

        Rollouts and critic updates happen once per optimizer step, for all its micro-batches together, so that
        gradient accumulation does not change the two time scales.
        """
        model.train()
        if self._window:
            self._experiences = [self._collect(batch) for batch in self._window]
            self._window = []
            for _ in range(self.args.critic_steps):
                self._train_critic(self._experiences)

        experience = self._experiences.pop(0)
        outputs = self._judge(experience)
        signal = combine(
            outputs,
            {reward.label: reward.weight for reward in self.rewards},
            self.args.num_generations,
            self.args.normalization,
            self.args.scale_rewards,
        )
        loss = self._student_loss(experience, signal)
        if not bool(loss.isfinite()):
            raise RDMError(f"the student's loss is {loss.item()}; lower the learning rates or look at log_images")
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        if signal.field is not None:
            self._check_student_gradient()
        if self.accelerator.sync_gradients:
            self.average_gradients(self.parameters_of(STUDENT))
        self._record(outputs, signal)
        return loss.detach() / self.current_gradient_accumulation_steps

    def _collect(self, inputs: dict[str, Any]) -> Experience:
        """Roll the student out for a micro-batch of prompts, group-major."""
        prompts: list[str] = inputs["prompts"]
        condition = self.encode(prompts)
        noise = torch.randn(len(prompts), *self.latent_shape, device=self.args.device)
        # A trajectory stopped at the last step has no density, so it is of no use where only scores teach.
        last = self.args.num_inference_steps if self._has_field else self.args.num_inference_steps - 1
        groups = len(prompts) // self.args.num_generations
        steps = draw_steps(groups, self.args.num_generations, last, noise.device)

        def student_of(rows: Tensor) -> Denoiser:
            return self.denoiser(STUDENT, select(condition, rows))

        result = rollout(student_of, noise, steps, self.sigmas, self.adapter.schedule, finish=self._has_advantage)
        return Experience(prompts, inputs["columns"], condition, result)

    def _train_critic(self, experiences: Sequence[Experience]) -> None:
        """One optimizer step for every trainable reward, on the student's latest samples."""
        critics = [(own, role) for own in self.rewards if (role := own.reward.capabilities.trains)]
        if not critics:
            return
        parameters = [parameter for _, role in critics for parameter in self.parameters_of(role)]
        for experience in experiences:
            for own, role in critics:
                batch = self._batch(experience, experience.rollout.x_0, trained=role)
                loss = own.reward.training_loss(batch)
                (loss / len(experiences)).backward()
                self._log_value(f"loss/{own.label}", loss)
        self.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.args.critic_max_grad_norm or torch.inf)
        if not bool(norm.isfinite()):
            raise RDMError(f"the critic's gradient norm is {norm.item()}; lower critic_learning_rate")
        self._log_value("dm/critic_grad_norm", norm)
        # The raw optimizer, because accelerate's wrapper skips steps in the middle of an accumulation window. The
        # student has no gradients at this point, and Adam leaves parameters without a gradient alone.
        optimizer: Any = self.optimizer
        getattr(optimizer, "optimizer", optimizer).step()
        for parameter in parameters:
            parameter.grad = None
        self._critic_steps += 1

    def _judge(self, experience: Experience) -> dict[str, RewardOutput]:
        """Evaluate every reward: gradients where the trajectory stopped, scores at its end."""
        final = experience.rollout.final
        outputs: dict[str, RewardOutput] = {}
        for scored, latents in ((False, experience.rollout.x_0), (True, final)):
            rewards = {
                own.label: own.reward
                for own in self.rewards
                if (own.reward.capabilities.gradient == "none" and final is not None) == scored
            }
            if rewards and latents is not None:
                outputs |= self._score(rewards, self._batch(experience, latents))
        return outputs

    def _score(self, rewards: dict[str, Reward], batch: RewardBatch) -> dict[str, RewardOutput]:
        # Of rewards without weight, the scores are watched.
        graded = [own.label for own in self.rewards if own.weight and own.label in rewards]
        size = self.args.reward_batch_size
        result = evaluate_rewards(rewards, batch, chunk_size=size, gradients_of=graded, **self._judging)
        self._reward_calls += len(result.outputs) * len(batch)
        for name in rewards:
            self._log_value(f"rewards/{name}/seconds", result.seconds[name])
            if self.args.reward_on_error == "skip":
                self._log_value(f"rewards/{name}/skipped", float(name in result.skipped))
        for name, error in result.skipped.items():
            logger.warning("reward %r was skipped: %s: %s", name, type(error).__name__, error)
        return result.outputs

    def _student_loss(self, experience: Experience, signal: Signal) -> Tensor:
        """Replay the stop step with gradients; move x_0 along the field and make good transitions likelier."""
        done = experience.rollout
        sigma = torch.tensor(self.sigmas, device=self.args.device)[done.steps]
        x_0 = self.denoiser(STUDENT, experience.condition)(done.states, sigma)
        losses = []
        if signal.field is not None:
            losses.append(pathwise_loss(x_0, signal.field))
            self._log_value("loss/pathwise", losses[-1])
        if signal.advantage is not None and done.next_states is not None:
            rows = (done.steps < self.args.num_inference_steps - 1).nonzero()[:, 0]
            transition = transition_to(self.adapter.schedule, x_0[rows], self.sigmas, done.steps[rows])
            # Averaged over dimensions, as the pathwise loss is, so that weights compare between the two routes.
            log_p = log_probability(transition, done.next_states[rows], reduction="mean")
            surrogate = clipped_surrogate(importance_ratio(log_p, log_p), signal.advantage[rows], self.args.epsilon)
            losses.append(surrogate.sum() / len(x_0))
            self._log_value("loss/policy", losses[-1])
        if not losses:
            raise RDMError("every reward was skipped, so there is nothing to learn from; the warnings above say why")
        return torch.stack(losses).sum()

    # ---- What the step is made of -------------------------------------------------------------------------------

    def _batch(self, experience: Experience, latents: Tensor, trained: str | None = None) -> RewardBatch:
        context = self._context(experience.condition, trained)
        group = self.args.num_generations
        return RewardBatch(latents, experience.prompts, group, self.adapter.decode, experience.columns, context)

    def _context(self, condition: Condition, trained: str | None = None) -> DiffusionContext:
        def denoiser(role: str) -> Denoiser:
            made = self.denoiser(role, condition)
            return made if role == trained else torch.no_grad()(made)

        args = self.args
        return DiffusionContext(self.adapter.schedule, denoiser, args.min_sigma, args.max_sigma, args.num_draws)

    @property
    def _judging(self) -> dict[str, Any]:
        """How this run evaluates rewards, in training and in `evaluate`."""
        args = self.args
        return {"device": args.reward_device, "offload": args.reward_offload, "on_error": args.reward_on_error}

    @property
    def _has_field(self) -> bool:
        return any(own.weight and own.reward.capabilities.gradient != "none" for own in self.rewards)

    @property
    def _has_advantage(self) -> bool:
        return any(own.weight and own.reward.capabilities.gradient == "none" for own in self.rewards)

    def _check_student_gradient(self) -> None:
        """Raise at the first step if no gradient reaches the student: training on would silently do nothing."""
        if not self._student_checked:
            if not any(p.grad is not None and bool(p.grad.any()) for p in self.parameters_of(STUDENT)):
                raise RDMError("no gradient reaches the student: are all reward weights 0, or all rewards constant?")
            self._student_checked = True

    # ---- Logs, samples and pictures -----------------------------------------------------------------------------

    def _log_value(self, name: str, value: Tensor | float) -> None:
        self._metrics[name].append(value.detach().item() if isinstance(value, Tensor) else float(value))

    def _record(self, outputs: dict[str, RewardOutput], signal: Signal) -> None:
        group = self.args.num_generations
        for own in self.rewards:
            self._log_value(f"weights/{own.label}", own.weight)
            if own.label not in outputs:
                continue
            scores, magnitude = outputs[own.label].scores, outputs[own.label].magnitude
            valid = scores[~scores.isnan()]
            self._log_value(f"rewards/{own.label}/mean", valid.mean())
            self._log_value(f"rewards/{own.label}/std", valid.std() if len(valid) > 1 else 0.0)
            self._log_value(f"rewards/{own.label}/nan", scores.isnan().sum())
            self._log_value(f"rewards/{own.label}/zero_std", zero_std_share(scores, group))
            if magnitude is not None:
                self._log_value(f"{own.label}/residual", magnitude.mean())
            if own.reward.capabilities.gradient == "none":
                self._log_value("frac_reward_zero_std", zero_std_share(scores, group))
        for name, pull in signal.magnitudes.items():
            self._log_value(f"{name}/pull", pull)

    def costs(self) -> dict[str, int]:
        """Return what the run has cost so far on this process: network evaluations in samples, updates, calls."""
        forwards = {f"cost/{role}_forwards": count for role, count in sorted(self.roles.forwards.items())}
        return forwards | {"cost/critic_steps": self._critic_steps, "cost/reward_calls": self._reward_calls}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            averages = {name: sum(values) / len(values) for name, values in self._metrics.items()}
            logs = logs | averages | {name: float(count) for name, count in self.costs().items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def after_step(self) -> None:
        super().after_step()
        step = self.state.global_step
        if self.args.log_images and step % self.args.log_images == 0 and self.args.should_save:
            self.write_images(Path(str(self.args.output_dir)) / "images" / f"step_{step:06d}.png")

    @torch.no_grad()
    def write_images(self, path: str | Path) -> Path:
        """Write the grid that shows a collapse early: student x_0, and what teacher and critic make of it re-noised.

        Prompts and seed are fixed, so that the grids of a run can be compared. The raw student is shown, not its
        moving average.
        """
        if self.train_dataset is None:
            raise DataError("write_images() shows the first training prompts: pass train_dataset to the trainer")
        prompts = list(dict.fromkeys(self.train_dataset[:64]["prompt"]))[:10]
        with self.seeded(self.args.seed):
            latents = self.sample_latents(prompts)
            rows = [("student x_0", latents)]
            sigma = torch.full((len(latents),), 0.6, device=latents.device)
            context = self._context(self.encode(prompts))
            x_t = context.add_noise(latents, sigma)
            rows.append(("teacher x_0\nfrom sigma 0.6", context.denoiser(TEACHER)(x_t, sigma)))
            critics = [role for role in self.roles.trainable_roles if role != STUDENT]
            rows += [(f"{role} x_0\nfrom sigma 0.6", context.denoiser(role)(x_t, sigma)) for role in critics]
            images = [(label, self.adapter.decode(row)) for label, row in rows]
        return image_grid(images, path, scale=max(1, 64 // images[0][1].shape[-1]))

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the student for the evaluation prompts, always with the same noise, and score the samples.

        Returns:
            The mean of every reward that can judge finished samples, as `<prefix>_rewards/<name>/mean`. The first of
            them is also `<prefix>_loss`, negated, so that `load_best_model_at_end` has something to go by.

        Raises:
            ConfigError: no reward judges finished samples, or there are no evaluation prompts.
        """
        judges = {own.label: own.reward for own in self.rewards if own.reward.capabilities.gradient != "field"}
        dataset = self.eval_dataset if eval_dataset is None else load_prompts(eval_dataset, "eval_dataset")
        if not judges or dataset is None:
            raise ConfigError(
                "evaluate() needs eval_dataset and a reward that judges images, beside or instead of 'dm'; add one "
                "with weight 0 to watch it without training on it, such as 'dm + 0*legibility'"
            )
        size = self.args.per_device_eval_batch_size
        in_groups = any(reward.capabilities.scope == "group" for reward in judges.values())
        group = self.args.num_generations if in_groups else 1
        inputs = collate([row for row in dataset for _ in range(group)])
        prompts = inputs["prompts"]
        with self.seeded(self.args.seed), self.exported_weights(), torch.no_grad():
            latents = [self.sample_latents(prompts[i : i + size]) for i in range(0, len(prompts), size)]
            batch = RewardBatch(torch.cat(latents), prompts, group, self.adapter.decode, inputs["columns"])
            outputs = evaluate_rewards(judges, batch, chunk_size=size, gradients_of=(), **self._judging).outputs
        if not outputs:
            raise RDMError("every reward was skipped in evaluate(), so there is nothing to report")
        metrics = {f"{metric_key_prefix}_rewards/{n}/mean": o.scores.nanmean().item() for n, o in outputs.items()}
        metrics[f"{metric_key_prefix}_loss"] = -next(iter(metrics.values()))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- State --------------------------------------------------------------------------------------------------

    def student_info(self) -> StudentInfo:
        args = self.args
        return StudentInfo(args.num_inference_steps, args.shift, self.rewards, non_default_settings(args))

    def capture_state(self) -> RunState:
        return RunState(
            fingerprint=self.fingerprint,
            rewards=[own.term.reference for own in self.rewards],
            adapters={role: describe_lora(self.roles.lora_config(role)) for role in self.roles.trainable_roles},
            forwards=dict(self.roles.forwards),
            critic_steps=self._critic_steps,
            reward_calls=self._reward_calls,
            ema_steps=None if self.ema is None else self.ema.optimization_step,
        )

    def restore_state(self, state: RunState) -> None:
        self.roles.forwards.clear()
        self.roles.forwards.update(state.forwards)
        self._critic_steps, self._reward_calls = state.critic_steps, state.reward_calls
