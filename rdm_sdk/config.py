"""`RDMConfig`: every setting of a run, the method's own beside those of `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from rdm_sdk.errors import ConfigError, nearest


@dataclass
class RDMConfig(TrainingArguments):
    """Settings of an `RDMTrainer` run.

    All of `transformers.TrainingArguments` apply; those below are the method's own, or have another default.
    `per_device_train_batch_size` counts samples, so a micro-batch holds `per_device_train_batch_size /
    num_generations` prompts. `learning_rate`, `max_grad_norm` and the learning-rate schedule are the student's.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the student."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a loss that is NaN must be seen."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: rewards may use every column."})

    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Off: batches are texts."})

    num_generations: int = field(default=8, metadata={"help": "Samples per prompt: the size G of a group."})
    num_inference_steps: int = field(default=4, metadata={"help": "Steps K of the student."})
    shift: float | None = field(
        default=None, metadata={"help": "Timestep shift of the student's grid; None takes the base scheduler's."}
    )
    height: int | None = field(default=None, metadata={"help": "Image height in pixels; None takes the model's."})
    width: int | None = field(default=None, metadata={"help": "Image width in pixels; None takes the model's."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Text tokens per prompt as in the pipeline's call; None takes its default."}
    )

    guidance_scale: float = field(
        default=4.5,
        metadata={"help": "Classifier-free guidance of the teacher, uncond + s (cond - uncond); 1 is none."},
    )
    min_sigma: float = field(default=0.02, metadata={"help": "Lowest noise level for renoising, in (0, 1)."})
    max_sigma: float = field(default=0.98, metadata={"help": "Highest noise level for renoising, in (0, 1)."})
    num_draws: int = field(default=1, metadata={"help": "Renoising draws M per sample and student step."})
    normalization: Literal["group", "sample", "batch"] = field(
        default="group",
        metadata={"help": "Whose statistic divides a reward's gradient: the group's (GNDM), the sample's (DMD2), all."},
    )

    critic_steps: int = field(default=5, metadata={"help": "Critic updates per student update."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; None takes the student's."}
    )
    critic_max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping of the critic; 0 is none."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of the student's moving average, which is then exported; 0 is none."}
    )

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One factor per reward, in order, on top of the weights in the spec."}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={"help": "Whose standard deviation divides centered scores of non-differentiable rewards."},
    )
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio, for scored rewards."})

    reward_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples that rewards judge at a time, to save memory; None is the whole micro-batch."},
    )
    reward_device: str | None = field(
        default=None, metadata={"help": "Device of the rewards' own models, such as 'cuda:1'; None is the run's."}
    )
    reward_offload: bool = field(
        default=False, metadata={"help": "Keep the rewards' models on the CPU between uses, to save memory."}
    )
    reward_on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What an exception inside a reward does: stop, or go on without that reward and count it."},
    )

    log_images: int = field(
        default=0, metadata={"help": "Write a grid of student, teacher and critic x_0 every so many steps; 0 is never."}
    )

    def __post_init__(self) -> None:
        for name in ("num_generations", "num_inference_steps", "num_draws"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        chunk, device = self.reward_batch_size, self.reward_device
        _require(chunk is None or chunk >= 1, "reward_batch_size", chunk, "at least 1 or None")
        _require(device is None or _is_device(device), "reward_device", device, "a device such as 'cpu' or 'cuda:1'")
        for name in ("critic_steps", "log_images", "critic_max_grad_norm"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            0 < self.min_sigma < self.max_sigma < 1,
            "min_sigma, max_sigma",
            (self.min_sigma, self.max_sigma),
            "0 < min_sigma < max_sigma < 1",
        )
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.epsilon > 0, "epsilon", self.epsilon, "positive")
        _require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "0 or more (1 is no guidance)")
        _require(self.shift is None or self.shift > 0, "shift", self.shift, "positive or None")
        for name, choices in (
            ("normalization", ("group", "sample", "batch")),
            ("scale_rewards", ("group", "batch", "none")),
            ("reward_on_error", ("raise", "skip")),
        ):
            value = getattr(self, name)
            _require(value in choices, name, value, f"one of {', '.join(choices)}.{nearest(str(value), choices)}")
        if self.per_device_train_batch_size % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts samples and must be a multiple "
                f"of num_generations={self.num_generations}, so that groups stay whole"
            )
        if self.fp16:
            raise ConfigError("fp16=True is not supported: its range is too small for scores. Use bf16=True.")
        super().__post_init__()  # type: ignore[no-untyped-call]


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} cannot be used; it must be {wanted}")


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def check_known(names: list[str], known: list[str]) -> None:
    """Raise `ConfigError` for the first setting that does not exist, naming the nearest one that does."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}.{nearest(name, known)}")


def _checked(init: Any) -> Any:
    """Wrap the dataclass's constructor so that a misspelt keyword names its nearest match."""
    known = [f.name for f in dataclasses.fields(RDMConfig) if f.init]

    @functools.wraps(init)
    def checked(self: RDMConfig, *args: Any, **kwargs: Any) -> None:
        check_known(list(kwargs), known)
        init(self, *args, **kwargs)

    return checked


RDMConfig.__init__ = _checked(RDMConfig.__init__)  # type: ignore[method-assign]
