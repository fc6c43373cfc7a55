"""`RDMTrainer`: a `transformers.Trainer` around the method's step (`step.py`): data, optimizers, logs, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from rdm_sdk.errors import DataError, RDMError
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.families.sharding import shard_base
from rdm_sdk.rewards.resolve import RewardFuncs
from rdm_sdk.training import checkpoint, checkpoint_folders, hub, validation
from rdm_sdk.training.accelerated import processes_of
from rdm_sdk.training.callbacks import run_callbacks, speak_plainly
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import GroupSampler, collate, group_sampler, load_prompts
from rdm_sdk.training.export import save_student, student_info
from rdm_sdk.training.faults import explained
from rdm_sdk.training.finished import evaluated, look
from rdm_sdk.training.interrupt import SaveOnSignal
from rdm_sdk.training.judge import Judge, add_run_roles
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.optimizers import CriticOptimizer, restart_rates
from rdm_sdk.training.picture_filter import PictureFilter
from rdm_sdk.training.pictures import image_grid
from rdm_sdk.training.prompt_encoding import prepare_prompts
from rdm_sdk.training.roll_call import roll_call
from rdm_sdk.training.run_keeper import RunKeeper
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.training.weighting import Weighting, make_weighting


class RDMTrainer(Trainer):
    """Distill a diffusion model into a few-step LoRA student with distribution matching as one reward among equals.

    Args:
        model: the base: a hub id, a local path, a loaded diffusers pipeline, or a `ModelFamily`.
        reward_funcs: what to maximize: a spec such as "dm + 0.5*legibility", a callable
            `f(images=, prompts=, **columns) -> list[float | None]`, a `Reward`, or a list of them; None is "dm".
        args: an `RDMConfig`.
        train_dataset: prompts: a `datasets.Dataset` with a `prompt` column, a list of strings, or the path of a file.
        eval_dataset: prompts for `evaluate`, in the same forms.
        processing_class: handed to `Trainer` as it is; the method itself needs none.
        callbacks: `transformers` callbacks.
        optimizers: must be left alone: the trained weights are made in here; `args` names optimizer and schedule.
        peft_config: the student's LoRA (rank and alpha 16 by default); None with full weights or `args.start_from`.
        fake_peft_config: LoRA of the critics; the student's by default. None where `args.critic_weights` is "full".
        weighting: a `Weighting` of your own, in place of the one that `args.weighting` names.

    Raises:
        ConfigError, DataError, RewardError, ModelError: something cannot work; raised here, before any training, and
            before the base is loaded wherever that is possible.
    """

    args: RDMConfig
    train_dataset: Dataset | None
    eval_dataset: Dataset | None

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
        validation.check_arguments(args, optimizers)
        train_dataset = None if train_dataset is None else load_prompts(train_dataset)
        eval_dataset = None if eval_dataset is None else load_prompts(eval_dataset, "eval_dataset")
        self.rewards, self.held_out = validation.run_rewards(reward_funcs, args)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        validation.check_run(args, self.rewards, datasets, weighting, self.held_out)
        self.shown = None if args.log_images_filter is None else PictureFilter(args.log_images_filter)
        roles = validation.role_configs(args, self.rewards, peft_config, fake_peft_config)
        self.family = validation.run_family(model, args)
        set_seed(args.seed)  # the adapters' initial weights are part of the run
        add_run_roles(self.family, roles, self.rewards, args.steps_told, args.start_from)
        if args.fsdp:
            shard_base(self.family, args.device)
        self.roles = self.family.roles
        self.critic_optimizer: CriticOptimizer | None = None
        self._staged: Path | None = None
        self._window: list[dict[str, Any]] = []
        self._position = 0
        self._sampler: GroupSampler | None = None
        super().__init__(
            model=self.roles,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*run_callbacks(self), *(callbacks or [])],  # a user's see the step's finished state
        )
        speak_plainly(self)
        validation.check_hosted(args, self.roles, self.is_deepspeed_enabled or self.is_fsdp_enabled)
        self._compose(make_weighting(args.weighting) if weighting is None else weighting)
        validation.check_same_plugins(self.accelerator.num_processes)
        self.interrupt = SaveOnSignal(self.step.processes)
        self.add_callback(self.interrupt)

    def _compose(self, weighting: Weighting) -> None:
        """Make the step and its parts."""
        args = self.args
        self.models = RunModels(self.family, args, args.device)
        self.roll_call = roll_call(args.ddp_timeout, args.device.type == "cpu")
        processes = processes_of(self.accelerator, self.roll_call)
        prepare_prompts(self.models, args, processes, self.train_dataset, self.eval_dataset)
        self.judge = Judge(self.models, self.rewards, args, None, processes, self.held_out)
        self.monitor, self.weighting = self.judge.monitor, weighting
        self.step = DistillationStep(self.judge, args, weighting)
        self.keeper = RunKeeper(args, self.step, self.models, self.train_dataset, self.accelerator.wait_for_everyone)

    # ---- The step -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Remember the micro-batches of the coming optimizer step: the critic learns from all of them first."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = list(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Begin an optimizer step with its first micro-batch; back-propagate the student's loss of every one."""
        model.train()
        try:
            return self._take_step()
        except RDMError as error:
            step, folder = self.state.global_step + 1, str(self.args.output_dir)
            raise explained(error, self.models, self.step.rollouts, step, folder) from error

    def _take_step(self) -> Tensor:
        if self._window:
            window, self._window, self._position = self._window, [], 0
            self.models.watch.begin()
            self.step.begin(window, self.state.global_step)
            self._train_critics()
        result = self.step.student_loss(self._position)
        self._position += 1
        self.accelerator.backward(result.loss / self.current_gradient_accumulation_steps)
        if self.accelerator.sync_gradients:
            self.step.end(self.state.global_step + 1)
            self.models.watch.end()
        return result.loss.detach() / self.current_gradient_accumulation_steps

    def _train_critics(self) -> None:
        """Take the critics' optimizer steps that come before one of the student."""
        if self.critic_optimizer is None:
            return
        for turn in range(self.args.critic_steps):
            for loss in self.step.critic_losses(turn):
                loss.backward()
            self.step.end_critics()
            self.critic_optimizer.step()
        self.critic_optimizer.next_rate()

    # ---- The networks -------------------------------------------------------------------------------------------

    @property
    def ema(self) -> EMAModel | None:
        """The student's moving average, if the run has one."""
        return self.models.ema

    @property
    def weights(self) -> dict[str, float]:
        """What each reward weighs in the coming optimizer step."""
        return self.step.weights

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """Return the trained parameters of a role, such as "student"."""
        return self.models.parameters_of(role)

    # ---- Optimizers and prompts ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the student's optimizer."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            group = {"params": self.parameters_of(STUDENT), "weight_decay": self.args.weight_decay}
            self.optimizer = cls([group | {"initial_lr": self.args.learning_rate}], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedules: the student's, and the critics' with their optimizer."""
        if self.judge.critics and self.critic_optimizer is None:
            self.critic_optimizer = CriticOptimizer(self.args, self.roles)
        if self.critic_optimizer is not None:
            self.critic_optimizer.begin(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self._sampler = group_sampler(self.args, len(dataset))
        return self._sampler

    # ---- Samples and figures ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], *, noise: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Sample the student (its moving average, if the run has one): RGB images `[N, 3, H, W]` in [0, 1].

        Args:
            prompts: N prompts.
            noise: the initial latents `[N, *x]`, which set the size; by default drawn at the run's (first) resolution.
            seed: makes the call repeatable and leaves the global random state alone; None draws from the global one.
        """
        with self.models.seeded(seed), self.models.exported_weights():
            return self.models.decode([self.models.sample_latents(prompts, noise)])[0]

    @torch.no_grad()
    def sample_each_step(self, prompts: Sequence[str], *, seed: int | None = None) -> list[Tensor]:
        """Sample as `sample` does, and return the images that the student predicts after each of its K evaluations.

        Compared with the teacher's (`frechet_distance`), they show which step is poor; the last are `sample`'s own.
        """
        with self.models.seeded(seed), self.models.exported_weights():
            return self.models.decode(self.models.sample_each_step(prompts))

    @torch.no_grad()
    def write_images(self, path: str | Path) -> Path:
        """Write the grid that shows a collapse early: student x_0, and what teacher and critics make of it re-noised.

        Prompts and seed are fixed, so that a run's grids can be compared. The raw student is shown, not its average.
        Where the base is shared out (`fsdp`), all processes call this, and the first one writes.
        """
        if self.train_dataset is None:
            raise DataError("write_images() shows the first training prompts: pass train_dataset to the trainer")
        prompts = list(dict.fromkeys(self.train_dataset[:64]["prompt"]))[:10]
        with self.models.seeded(self.args.seed):
            images = look(self.models, self.judge, prompts, self.shown)
        return image_grid(images, path) if self.args.should_save or not self.roles.sharded else Path(path)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the student for the evaluation prompts, always with the same noise, and score the samples.

        Returns:
            The mean of every reward that can judge finished samples (also of `args.eval_rewards`), over those it is
            for, as `<metric_key_prefix>_rewards/<name>/mean`; the first, negated, is `<metric_key_prefix>_loss` too.

        Raises:
            ConfigError: no reward judges finished samples, or there are no evaluation prompts.
        """
        dataset = self.eval_dataset if eval_dataset is None else load_prompts(eval_dataset, "eval_dataset")
        size = self.args.per_device_eval_batch_size
        metrics = evaluated(self.models, self.judge, dataset, size, metric_key_prefix, self.step.targets)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self.judge.agreeing():
            return super()._evaluate(*arguments, **options)

    def costs(self) -> dict[str, int]:
        """Return what the run has cost so far on this process: network evaluations in samples, updates, calls."""
        forwards = {f"cost/{role}_forwards": count for role, count in sorted(self.roles.forwards.items())}
        return forwards | {f"cost/{name}": count for name, count in self.monitor.spent.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the step's figures beside Trainer's."""
        if "loss" in logs:
            logs = logs | self.monitor.averages(self.judge.processes) | {k: float(v) for k, v in self.costs().items()}
        super().log(logs, start_time)

    # ---- Saving and resuming ------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student (its moving average, if the run has one) so that plain diffusers and PEFT load it.

        A checkpoint (Trainer's internal call) gets the training state as well.
        """
        target = Path(output_dir or str(self.args.output_dir))
        self._export(target)
        if _internal_call:
            self.keeper.write_state(target)
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def _export(self, target: Path) -> None:
        if self.args.should_save:
            with self.models.exported_weights():
                save_student(target, self.family, student_info(self.args, self.models.shift, self.rewards))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository on the Hub that the settings name, if there is none."""
        self.push_in_progress = None  # pushes during the training are over when they return
        if self.is_world_process_zero():
            self.hub_model_id = hub.make_repository(self.args, token, private)  # type: ignore[assignment]

    def push_to_hub(self, commit_message: str | None = "End of training", **options: Any) -> Any:  # type: ignore[override]
        """Write the student to `output_dir` and upload it; `options` are Trainer's, as `hub.push` has them."""
        if self.hub_model_id is None:
            self.init_hf_repo(options.get("token"), options.pop("private", None))
        self._export(Path(str(self.args.output_dir)))
        return hub.push(self.args, self.hub_model_id, self.family.component, str(commit_message), **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: `_save_checkpoint` pushes when the checkpoint is whole and has its name."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint, which is checked before it is used.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or True or "latest": the newest whole one in `output_dir`,
                and a new run where there is none yet. By default, that of the settings.
            trial, ignore_keys_for_eval: as in `Trainer`.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or of another run; or `output_dir` holds
                checkpoints of another run, which this one would mix with its own.
            ConfigError: another run is training in `output_dir`.
            DataError: there is no train_dataset.
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, when the run has been saved.
        """
        if self.train_dataset is None:
            raise DataError("train() needs prompts: pass train_dataset to the trainer")
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with self.interrupt.watching(), self.roll_call.attended(), self.keeper.alone():
            folder = self.keeper.begin(wanted)
            state = None if folder is None else self.keeper.finished(folder)
            if state is None:
                result = super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
            else:
                self.state = state
                self.keeper.restore_finished(str(folder), state)
                result = TrainOutput(state.global_step, 0.0, {})
        self.interrupt.leave(self.args, self.state)
        return result

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = str(self.args.metric_for_best_model)
        known = name == "None" or f"eval_{name.removeprefix('eval_')}" in metrics  # or its reward was skipped
        return (known and super()._determine_best_metric(metrics, trial)) or self.interrupt.ending

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.keeper.restore(resume_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(super()._get_output_dir(trial))
        try:
            with self.keeper.writing(self.state, output_dir) as self._staged:
                super()._save_checkpoint(model, trial)
        finally:
            self._staged = None
        hub.push_checkpoint(self.args, self.hub_model_id, self.family.component, output_dir, self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.critic_optimizer is not None and self.args.should_save:
            torch.save(self.critic_optimizer.state_dict(), Path(output_dir) / checkpoint.CRITIC_OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is None:
            return
        restart_rates(self.args, self.optimizer, self.lr_scheduler)
        if self.critic_optimizer is not None:
            saved = checkpoint.load_critic_optimizer(Path(checkpoint_folder), self.args.device)
            self.critic_optimizer.load_state_dict(saved)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        super()._load_rng_state(checkpoint_folder)
        checkpoint.restore_random(checkpoint_folder, self.args.device)

    def _finalize_training(self, *args: Any) -> Any:
        with checkpoint_folders.newest_kept(self.args):
            return super()._finalize_training(*args)  # type: ignore[no-untyped-call]

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights and moving average in place (`load_best_model_at_end`)."""
        self.keeper.load_weights(str(self.state.best_model_checkpoint))
