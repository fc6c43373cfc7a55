"""Hosting the method in `transformers.Trainer`: roles, optimizer, prompts, sampling, export and resume.

Nothing here knows about rewards; `trainer.py` holds the step.
"""

from __future__ import annotations

import random
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from rdm_sdk.errors import CheckpointError, ConfigError, DataError
from rdm_sdk.families.base import ModelAdapter
from rdm_sdk.families.placement import Offload, drop_text_encoders, slice_vae, tile_vae
from rdm_sdk.families.roles import STUDENT, TEACHER, Roles
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.method.sampling import FewStepPolicy, sample, sample_each_step
from rdm_sdk.training import checkpoint
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import GroupSampler, PromptCache, collate
from rdm_sdk.training.export import StudentInfo, move_into, save_student
from rdm_sdk.training.optimizers import CriticOptimizer
from rdm_sdk.training.rollouts import read_rollouts, rollouts_path, write_rollouts
from rdm_sdk.types import Condition, Denoiser, Experience


class RoleTrainer(Trainer):
    """A Trainer of LoRA roles on one frozen base; subclasses write `training_step`."""

    args: RDMConfig
    train_dataset: Dataset | None
    eval_dataset: Dataset | None

    def __init__(
        self, adapter: ModelAdapter, args: RDMConfig, callbacks: list[TrainerCallback] | None, **kwargs: Any
    ) -> None:
        self.adapter = adapter
        self.roles: Roles = adapter.roles
        if adapter.guidance == "none" and args.guidance_scale != 1.0:
            raise ConfigError(
                f"guidance_scale={args.guidance_scale}: {adapter.base_name!r} was distilled without guidance, and its "
                "pipeline takes none; set guidance_scale=1"
            )
        self.latent_shapes = [adapter.latent_shape(*size) for size in args.sizes]
        self.shift = adapter.base_shift(self.latent_shapes[0]) if args.shift is None else args.shift
        sigmas = tuple(adapter.student_sigmas(args.num_inference_steps, self.shift))
        self.policy = FewStepPolicy(adapter.schedule, sigmas, args.sampler, args.eta)
        if args.sampler == "sde" and not isinstance(adapter.schedule, FlowSchedule):
            raise ConfigError(
                f"sampler='sde' is derived for rectified flows, and {adapter.base_name!r} is none; use 'cps' or "
                "'renoise'"
            )
        self.fingerprint = adapter.fingerprint()
        self.run_state: checkpoint.RunState | None = None
        self.critic_optimizer: CriticOptimizer | None = None
        self._sampler: GroupSampler | None = None
        # The bookkeeper comes first, so that a user's callbacks see the step's finished state.
        super().__init__(
            model=self.roles,
            args=args,
            data_collator=collate,
            callbacks=[_Bookkeeper(self), *(callbacks or [])],
            **kwargs,
        )
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which cannot switch roles; start with "
                "'accelerate launch' or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("DeepSpeed and FSDP are not supported yet; use plain distributed data parallel")
        self._place_frozen_parts()
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)  # other noise than the first process, same weights
        self.ema: EMAModel | None = None
        if args.ema_decay:
            self.ema = EMAModel(self.parameters_of(STUDENT), decay=args.ema_decay, foreach=True)

    @abstractmethod
    def student_info(self) -> StudentInfo:
        """Return what the export says about the student."""

    @abstractmethod
    def capture_state(self) -> checkpoint.RunState:
        """Return the state that a checkpoint keeps beside tensors."""

    @abstractmethod
    def stored_experiences(self) -> list[list[Experience]]:
        """Return the rollouts that later optimizer steps will use again, per step, in order."""

    @abstractmethod
    def restore_state(self, state: checkpoint.RunState, experiences: list[list[Experience]]) -> None:
        """Take up a checkpoint's state."""

    # ---- Frozen parts -------------------------------------------------------------------------------------------

    def _place_frozen_parts(self) -> None:
        """Bring the model to the device, VAE and text encoders as the run says."""
        args, adapter = self.args, self.adapter
        if args.vae_slicing:
            slice_vae(adapter)
        if args.vae_tiling:
            tile_vae(adapter)
        self._vae = Offload([adapter.pipeline.vae] if args.vae_offload else [], args.device)
        offload = args.text_encoders == "offload"
        encoders = Offload(adapter.text_encoders().values() if offload else [], args.device)
        adapter.to(args.device)
        self.encode = PromptCache(
            partial(adapter.condition, guidance_scale=args.guidance_scale),
            args.device,
            capacity=None if args.text_encoders == "drop" else 256,
            encoded=encoders.release,
        )
        if offload:
            self.encode([None])  # now, because its first use is while the student's graph takes the memory
        if args.text_encoders == "drop":
            self._encode_and_drop()

    def _encode_and_drop(self) -> None:
        """Encode every prompt of the datasets, and let go of the text encoders."""
        datasets = [dataset for dataset in (self.train_dataset, self.eval_dataset) if dataset is not None]
        prompts = list(dict.fromkeys(prompt for dataset in datasets for prompt in dataset["prompt"]))
        self.encode([None])
        needed, free = self.encode.bytes_per_prompt() * len(prompts), psutil.virtual_memory().available
        if needed > free:
            raise ConfigError(
                f"text_encoders='drop' keeps the encodings of all {len(prompts)} prompts in memory, {needed / 1e9:.1f} "
                f"GB, and {free / 1e9:.1f} GB are free; use text_encoders='offload'"
            )
        for prompt in tqdm(prompts, desc="encoding prompts", disable=self.args.disable_tqdm):
            self.encode([prompt])
        drop_text_encoders(self.adapter)
        self.encode.close(
            "text_encoders='drop' has let go of the encoders, and it is not among the datasets' prompts; add it there, "
            "or use text_encoders='offload'"
        )

    @contextmanager
    def vae_at_hand(self) -> Iterator[None]:
        """Let the VAE go back to where it waits, if it does, after the block that decodes and differentiates."""
        try:
            yield
        finally:
            self._vae.release()

    # ---- Roles --------------------------------------------------------------------------------------------------

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.roles.parameters_of(role).values())

    @property
    def guided(self) -> bool:
        """Whether the teacher's predictions with and without the prompt are combined to guided ones."""
        return self.adapter.guidance == "classifier-free" and self.args.guidance_scale != 1.0

    def denoiser(self, role: str, condition: Condition, steps: Tensor | None = None) -> Denoiser:
        """Return a role's denoiser for a condition; the teacher's is guided as the run says.

        `steps` (int64 `[N]`) are the student's that made the samples, for critics that are told them.
        """
        if role != TEACHER or not self.guided:
            return self.adapter.denoiser(self.roles, role, self.roles.tell(role, condition, steps))
        pair = self.teacher_pair(condition)
        return lambda x_t, sigma: self.guide(x_t, sigma, *pair(x_t, sigma))

    def guide(self, x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor) -> Tensor:
        """Return the run's guided x_0 `[N, *x]` of the teacher's two predictions."""
        return self.adapter.guide(x_t, sigma, with_prompt, without, self.args.guidance_scale)

    def teacher_pair(self, condition: Condition) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return `(x_t, sigma) -> (x_0 with the prompt, x_0 without)` of the teacher, from one pass."""
        count = next(iter(condition.values())).shape[0]
        return self.adapter.denoiser_pair(self.roles, TEACHER, condition, self.encode([None] * count))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over the processes.

        The roles take turns in one step, which distributed data parallel's own hooks cannot follow; they stay idle,
        because no forward goes through its wrapper.
        """
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the student's optimizer."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            group = {"params": self.parameters_of(STUDENT), "weight_decay": self.args.weight_decay}
            self.optimizer = cls([group], **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedules: the student's, and the critics' with their optimizer."""
        critics = [role for role in self.roles.trainable_roles if role != STUDENT]
        if critics and self.critic_optimizer is None:
            embeddings = [p for role in critics for p in self.roles.embedding_parameters_of(role).values()]
            apart = set(map(id, embeddings))
            weights = [p for role in critics for p in self.parameters_of(role) if id(p) not in apart]
            self.critic_optimizer = CriticOptimizer(self.args, weights, embeddings)
        if self.critic_optimizer is not None:
            self.critic_optimizer.begin(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Prompts ------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        groups = self.args.per_device_train_batch_size // self.args.num_generations
        together = groups * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        reuse = self.args.num_iterations, self.args.steps_per_generation
        self._sampler = GroupSampler(len(dataset), self.args.num_generations, together, seed, *reuse)
        return self._sampler

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch that the sampler's order depends on."""
        if self._sampler is not None:
            self._sampler.epoch = epoch

    # ---- Samples ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], *, noise: Tensor | None = None, seed: int | None = None) -> Tensor:
        """Sample the student (its moving average, if the run has one): RGB images `[N, 3, H, W]` in [0, 1].

        Args:
            prompts: N prompts.
            noise: the initial latents `[N, *x]`, which set the size; by default drawn at the run's (first) resolution.
            seed: makes the call repeatable and leaves the global random state alone; None draws from the global one.
        """
        with self.seeded(seed), self.exported_weights():
            latents = self.sample_latents(prompts, noise)
            with self.vae_at_hand():
                return self.adapter.decode(latents)

    def step_shape(self) -> tuple[int, ...]:
        """Return the shape of the latents of the coming optimizer step.

        It depends on the seed and the step alone, so that all processes and a resumed run agree.
        """
        return random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.latent_shapes)

    @torch.no_grad()
    def sample_each_step(self, prompts: Sequence[str], *, seed: int | None = None) -> list[Tensor]:
        """Sample as `sample` does, and return the images that the student predicts after each of its K evaluations.

        Compared with the teacher's samples (`frechet_distance`), they show what the last alone hides: which step is
        poor, and whether late steps move away from what earlier ones have reached. The last are `sample`'s own.
        """
        with self.seeded(seed), self.exported_weights():
            student = self.denoiser(STUDENT, self.encode(prompts))
            steps = list(sample_each_step(student, self._initial_noise(len(prompts)), self.policy.inference()))
            with self.vae_at_hand():
                return [self.adapter.decode(latents) for latents in steps]

    def sample_latents(self, prompts: Sequence[str], noise: Tensor | None = None) -> Tensor:
        noise = self._initial_noise(len(prompts)) if noise is None else noise.to(self.args.device)
        return sample(self.denoiser(STUDENT, self.encode(prompts)), noise, self.policy.inference())

    def _initial_noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.latent_shapes[0], device=self.args.device)

    @contextmanager
    def seeded(self, seed: int | None) -> Iterator[None]:
        """Fix the seed for the duration of the block, and count none of its forwards as training cost."""
        forwards = self.roles.forwards.copy()
        try:
            if seed is None:
                yield
            else:
                with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    yield
        finally:
            self.roles.forwards = forwards

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """Put the moving average in the student's place for the duration of the block."""
        if self.ema is None:
            yield
            return
        parameters = self.parameters_of(STUDENT)
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    # ---- Saving and resuming ------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student (its moving average, if the run has one) so that plain diffusers and PEFT load it.

        A checkpoint (Trainer's internal call) gets the training state as well.
        """
        target = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            with self.exported_weights():
                save_student(target, self.adapter, self.student_info())
            if _internal_call:
                shadow = None if self.ema is None else self.ema.shadow_params
                with tempfile.TemporaryDirectory(dir=target, prefix=".state-") as scratch:
                    checkpoint.save_state(Path(scratch), self.adapter, shadow, self.capture_state())
                    move_into(Path(scratch), target)
        if _internal_call:  # every process has samples of its own
            write_rollouts(rollouts_path(target, self.args.process_index), self.stored_experiences())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def after_step(self) -> None:
        """Called after every optimizer step: update the student's moving average."""
        if self.ema is not None:
            self.ema.step(self.parameters_of(STUDENT))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint (True: the latest in `output_dir`), which is checked before it is used.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged or of another run.
            DataError: there is no train_dataset.
        """
        if self.train_dataset is None:
            raise DataError("train() needs prompts: pass train_dataset to the trainer")
        self.run_state = None
        if resume_from_checkpoint:
            if isinstance(resume_from_checkpoint, bool):
                latest: str | None = get_last_checkpoint(self.args.output_dir)
                if latest is None:
                    raise CheckpointError(f"cannot resume: there is no checkpoint in {self.args.output_dir!r}")
                resume_from_checkpoint = latest
            stored = rollouts_path(resume_from_checkpoint, self.args.process_index)
            self.run_state = checkpoint.check(resume_from_checkpoint, self.capture_state(), stored)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = self.run_state
        if state is None:
            raise CheckpointError("a checkpoint is loaded through train(resume_from_checkpoint=...)")
        self._load_weights(resume_from_checkpoint)
        if self.ema is not None:
            self.ema.optimization_step = state.ema_steps or 0
        path = rollouts_path(resume_from_checkpoint, self.args.process_index)
        self.restore_state(state, read_rollouts(path, self.args.device) if state.stored_rollouts else [])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.critic_optimizer is not None and self.args.should_save:
            checkpoint.save_critic_optimizer(Path(output_dir), self.critic_optimizer.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if self.critic_optimizer is not None and checkpoint_folder is not None:
            self.critic_optimizer.load_state_dict(
                checkpoint.load_critic_optimizer(Path(checkpoint_folder), self.args.device)
            )

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights and moving average in place (`load_best_model_at_end`)."""
        self._load_weights(str(self.state.best_model_checkpoint))

    def _load_weights(self, directory: str) -> None:
        shadow = checkpoint.load_weights(directory, self.adapter)
        if self.ema is not None:
            if sorted(shadow) != list(range(len(self.ema.shadow_params))):
                raise CheckpointError(
                    f"cannot load {directory!r}: its moving average holds {len(shadow)} tensors, "
                    f"this run's {len(self.ema.shadow_params)}; was the run started with other LoRA targets?"
                )
            for position, own in enumerate(self.ema.shadow_params):
                own.copy_(shadow[position])


class _Bookkeeper(TrainerCallback):
    """What happens around an optimizer step: epochs for the sampler, the moving average, pictures."""

    def __init__(self, trainer: RoleTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.start_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.after_step()
