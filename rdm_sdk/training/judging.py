"""A trainer that judges samples by rewards: what rewards see of the run, what they say, and what is told of it.

`hosting.py` below knows roles, `trainer.py` above holds the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rdm_sdk.errors import ConfigError, DataError, RDMError
from rdm_sdk.families.base import ModelAdapter
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import DiffusionContext, Times
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.rewards.resolve import WeightedReward, carried_back
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import collate, load_prompts
from rdm_sdk.training.hosting import RoleTrainer
from rdm_sdk.training.monitor import Monitor
from rdm_sdk.training.pictures import image_grid
from rdm_sdk.types import Condition, Denoiser, RewardOutput, Samples


class JudgingTrainer(RoleTrainer):
    """A `RoleTrainer` with rewards; subclasses write the step."""

    def __init__(
        self,
        adapter: ModelAdapter,
        args: RDMConfig,
        callbacks: list[TrainerCallback] | None,
        rewards: Sequence[WeightedReward],
        **kwargs: Any,
    ) -> None:
        self.rewards = rewards
        self.monitor = Monitor()
        self.spent = Counter({"rollouts": 0, "critic_steps": 0, "reward_calls": 0})
        super().__init__(adapter, args, callbacks, **kwargs)

    def context(
        self, condition: Condition, steps: Tensor | None = None, trained: str | None = None
    ) -> DiffusionContext:
        """Return what model-aware rewards see of samples that the student made at steps k (int64 `[N]`).

        Graphs are kept for the role that is being `trained`, and the teacher's, to x_t, where gradients of rewards are
        carried back through it.
        """
        carries_back = carried_back(self.rewards)

        def denoiser(role: str) -> Denoiser:
            made = self.denoiser(role, condition, steps)
            return made if role == trained or (role == TEACHER and carries_back) else torch.no_grad()(made)

        def teacher_pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(carries_back):
                return self.teacher_pair(condition)(x_t, sigma)

        def unprompted(x_t: Tensor, sigma: Tensor) -> Tensor:
            with torch.no_grad():
                blank = self.encode([None] * len(x_t))
                return self.adapter.denoiser(self.roles, TEACHER, blank)(x_t, sigma)

        args = self.args
        times, critic_times = self.times(steps)
        return DiffusionContext(
            self.adapter.schedule,
            denoiser,
            *times,
            args.num_draws,
            args.spread,
            args.critic_correction,
            self.guide if self.guided else None,
            teacher_pair,
            self.adapter.features(self.roles, TEACHER, condition),
            self.adapter.encode_images,
            unprompted,
            critic_times,
            steps if self.args.steps_told else None,
            carries_back,
        )

    def times(self, steps: Tensor | None) -> tuple[Times, Times]:
        """Return between which times samples are re-noised for the student's update, and for the critics'.

        Where each step is matched in a range of its own, samples of step k (int64 `[N]`) are re-noised to levels
        between the one that it leads to and its own: to no other do the steps behind it ever re-noise them (arXiv
        2503.06674). Otherwise the critics learn at all times, as in DMD2 (arXiv 2405.14867).
        """
        args = self.args
        if args.matching != "range" or steps is None:
            return (args.min_time, args.max_time), (0.0, 1.0)
        low, high = self.policy.times(steps)
        low = low.clamp_min(args.min_time)
        high = torch.maximum(high.clamp_max(args.max_time), low)
        return (low, high), (low, high)

    @property
    def judging(self) -> dict[str, Any]:
        """How this run evaluates rewards, in training and in `evaluate`."""
        args = self.args
        return {"device": args.reward_device, "offload": args.reward_offload, "on_error": args.reward_on_error}

    def batch(self, samples: Samples, trained: str | None = None) -> RewardBatch:
        return RewardBatch(
            samples.x_0,
            samples.prompts,
            self.args.num_generations,
            self.adapter.decode,
            samples.columns,
            self.context(samples.condition, samples.steps, trained),
            samples.weights,
        )

    def score(self, rewards: Sequence[WeightedReward], batch: RewardBatch) -> dict[str, RewardOutput]:
        """Evaluate rewards on a batch; those without weight are watched, and leave no trace in the random state."""
        outputs: dict[str, RewardOutput] = {}
        for counts in (True, False):
            chosen = [own for own in rewards if bool(own.weight) == counts]
            if chosen:
                with self.aside(*chosen), self.vae_at_hand():
                    graded = [own.label for own in chosen if counts and own.pathwise]
                    result = evaluate_rewards(
                        {own.label: own.reward for own in chosen},
                        batch,
                        chunk_size=self.args.reward_batch_size,
                        gradients_of=graded,
                        **self.judging,
                    )
                outputs |= result.outputs
                self.spent["reward_calls"] += len(result.outputs) * len(batch)
                self.monitor.evaluation(result, skips=self.args.reward_on_error == "skip")
        return outputs

    def has(self, pathwise: bool) -> bool:
        """Whether a reward that counts acts by its gradient (or by its scores)."""
        return any(own.weight and own.pathwise == pathwise for own in self.rewards)

    @contextmanager
    def aside(self, *rewards: WeightedReward) -> Iterator[None]:
        """Run the block without a trace in the random state if none of the rewards counts: watching changes nothing."""
        if any(own.weight for own in rewards):
            yield
            return
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            yield

    def effective_share(self, ratio: Tensor) -> float:
        """Return the effective share of samples with these ratios `[N]`, over all processes."""
        weights = ratio.double()
        sums = torch.stack(
            [weights.sum(), weights.square().sum(), torch.tensor(float(len(ratio)), device=ratio.device)]
        )
        total, squares, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        share = total**2 / (squares * count) if squares else 0.0
        self.monitor.log("ratio/ess", share)
        self.monitor.log("ratio/mean", total / count)
        return share

    def record(self, outputs: Mapping[str, RewardOutput]) -> None:
        for own in self.rewards:
            if own.label in outputs:
                self.monitor.reward(own, outputs[own.label], self.args.num_generations)

    def costs(self) -> dict[str, int]:
        """Return what the run has cost so far on this process: network evaluations in samples, updates, calls."""
        forwards = {f"cost/{role}_forwards": count for role, count in sorted(self.roles.forwards.items())}
        return forwards | {f"cost/{name}": count for name, count in self.spent.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self.monitor.averages() | {name: float(count) for name, count in self.costs().items()}
        super().log(logs, start_time)

    def after_step(self) -> None:
        super().after_step()
        step = self.state.global_step
        if self.args.log_images and step % self.args.log_images == 0 and self.args.should_save:
            self.write_images(Path(str(self.args.output_dir)) / "images" / f"step_{step:06d}.png")

    @torch.no_grad()
    def write_images(self, path: str | Path) -> Path:
        """Write the grid that shows a collapse early: student x_0, and what teacher and critics make of it re-noised.

        Prompts and seed are fixed, so that the grids of a run can be compared. The raw student is shown, not its moving
        average.
        """
        if self.train_dataset is None:
            raise DataError("write_images() shows the first training prompts: pass train_dataset to the trainer")
        prompts = list(dict.fromkeys(self.train_dataset[:64]["prompt"]))[:10]
        with self.seeded(self.args.seed):
            latents = self.sample_latents(prompts)
            rows = [("student x_0", latents)]
            sigma = torch.full((len(latents),), 0.6, device=latents.device)
            last = torch.full((len(prompts),), self.policy.num_steps - 1, device=latents.device)
            context = self.context(self.encode(prompts), last)
            x_t = context.add_noise(latents, sigma)
            rows.append(("teacher x_0\nfrom sigma 0.6", context.denoiser(TEACHER)(x_t, sigma)))
            critics = [role for role in self.roles.denoising_roles if role != STUDENT]
            rows += [(f"{role} x_0\nfrom sigma 0.6", context.denoiser(role)(x_t, sigma)) for role in critics]
            with self.vae_at_hand():
                images = [(label, self.adapter.decode(row)) for label, row in rows]
        return image_grid(images, path, scale=max(1, 64 // images[0][1].shape[-1]))

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the student for the evaluation prompts, always with the same noise, and score the samples.

        Returns:
            The mean of every reward that can judge finished samples, as `<metric_key_prefix>_rewards/<name>/mean`. The
            first of them is also `<metric_key_prefix>_loss`, negated, so that `load_best_model_at_end` has something to
            go by.

        Raises:
            ConfigError: no reward judges finished samples, or there are no evaluation prompts.
        """
        judges = {own.label: own.reward for own in self.rewards if not own.reward.capabilities.needs_models}
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
        with self.seeded(self.args.seed), self.exported_weights():
            latents = [self.sample_latents(prompts[i : i + size]) for i in range(0, len(prompts), size)]
            batch = RewardBatch(torch.cat(latents), prompts, group, self.adapter.decode, inputs["columns"])
            with self.vae_at_hand():
                outputs = evaluate_rewards(judges, batch, chunk_size=size, gradients_of=(), **self.judging).outputs
        if not outputs:
            raise RDMError("every reward was skipped in evaluate(), so there is nothing to report")
        metrics = {
            f"{metric_key_prefix}_rewards/{name}/mean": output.scores.nanmean().item()
            for name, output in outputs.items()
        }
        metrics[f"{metric_key_prefix}_loss"] = -next(iter(metrics.values()))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def reward_heads(
    rewards: Sequence[WeightedReward], adapter: ModelAdapter, steps_told: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the trained roles that are modules of their own, with the modules.

    `steps_told` is K, if critics are told the student's step, and 0 if not.
    """
    for own in rewards:
        role = own.reward.capabilities.trains
        if role and own.reward.capabilities.head:
            yield role, own.reward.make_head(adapter.feature_width, steps_told)
