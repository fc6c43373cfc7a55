"""`RDMConfig`: every setting of a run, the method's own beside those of `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from transformers import SchedulerType, TrainingArguments

from rdm_sdk.errors import ConfigError
from rdm_sdk.rewards.routes import parse_route
from rdm_sdk.training.fsdp_settings import sharding_of_ours
from rdm_sdk.training.inherited import check_inherited, name_checkpointing
from rdm_sdk.training.rules import check_known, check_rules, check_together, parse_resolution, settle_types
from rdm_sdk.training.weighting import make_weighting

SQUARE: dict[str, Any] = {"power": 2, "lr_end": 0.0}
"""Options of the default schedule: rates are those of a line that falls to 0, squared."""

_T = TypeVar("_T")


def _setting(default: _T, meaning: str) -> _T:
    """Return a field with a default and a help text, as type checkers see it: its default."""
    return field(default=default, metadata={"help": meaning})


class _KnownSettings(TrainingArguments):
    """Refuses settings that do not exist before the dataclass's constructor does, which names no nearest one.

    A separate base, so that the signature that tools show is the constructor's.
    """

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        check_known(list(settings), [f.name for f in dataclasses.fields(cls) if f.init])
        return super().__new__(cls)


@dataclass
class RDMConfig(_KnownSettings):
    """Settings of an `RDMTrainer` run.

    All of `transformers.TrainingArguments` apply; those below are the method's own, or have another default.
    `per_device_train_batch_size` counts samples, so a micro-batch holds `per_device_train_batch_size /
    num_generations` prompts. `learning_rate`, `max_grad_norm` and the learning-rate schedule are the student's.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "critic_lr_scheduler_kwargs"]  # noqa: RUF012

    # ---- Settings of transformers with another default
    learning_rate: float = _setting(2e-4, "Learning rate of the student.")
    lr_scheduler_type: str = _setting(
        "polynomial", "Schedule of the learning rates: they fall to 0 by the end of the run, fast at first."
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: dict(SQUARE),
        metadata={"help": "Options of the schedule. The default's are for 'polynomial' alone: others begin with none."},
    )
    adam_beta1: float = _setting(
        0.0, "Adam's beta1. Student and critics chase each other, and momentum keeps them from meeting."
    )
    adam_beta2: float = _setting(0.99, "Adam's beta2.")
    logging_steps: float = _setting(10, "Log every so many optimizer steps.")
    logging_nan_inf_filter: bool = _setting(False, "Off: a loss that is NaN must be seen.")
    remove_unused_columns: bool = _setting(False, "Off: rewards may use every column.")
    dataloader_pin_memory: bool = _setting(False, "Off: batches are texts.")
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Run blocks again in the backward pass, to save memory; None is what the older name, "
            "gradient_checkpointing, says.",
            "nargs": "?",
            "const": True,
        },
    )

    # ---- Samples
    num_generations: int = _setting(8, "Samples per prompt: the size G of a group.")
    num_inference_steps: int = _setting(4, "Steps K of the student.")
    shift: float | None = _setting(None, "Timestep shift of the student's grid; None takes the base scheduler's.")
    height: int | None = _setting(None, "Image height in pixels; None takes the model's.")
    width: int | None = _setting(None, "Image width in pixels; None takes the model's.")
    resolutions: list[str] | None = _setting(
        None,
        "Image sizes to train at, height x width, such as '1024x1024 832x1216'; every optimizer step draws one. None "
        "is height and width alone.",
    )
    max_sequence_length: int | None = _setting(
        None, "Text tokens per prompt as in the pipeline's call; None takes its default."
    )

    # ---- Distribution matching
    guidance_scale: float = _setting(
        4.5, "Classifier-free guidance of the teacher: uncond + s (cond - uncond); 1: none."
    )
    min_time: float = _setting(
        0.02,
        "From where on the student's samples are re-noised for its update, as a share of the base's training timesteps "
        "(of a flow: its noise levels), in [0, 1). Critics learn at all of them.",
    )
    max_time: float = _setting(0.98, "Up to where they are re-noised, in (0, 1).")
    normalization: Literal["group", "sample"] = _setting(
        "sample", "What divides a reward's gradient: its magnitude at the sample (DMD2), or averaged over the group."
    )
    spread: Literal["stratified", "shared", "free"] = _setting(
        "stratified", "Noise levels and trained steps inside a group: spread evenly, one for all, or each drawn freely."
    )
    critic_correction: Literal["others", "none"] = _setting(
        "others",
        "Take the critic's lag, as the mean residual of the group's other samples shows it, out of the gradient of "
        "'dm', or do not.",
    )

    # ---- Critics
    matching: Literal["step", "path", "range", "mixture"] = _setting(
        "step",
        "What critics learn, and so what of the student is matched to the teacher: each step's samples by themselves, "
        "because critics are told the step; the same on the student's own path, for sampler='ode' (PDMD); each step's "
        "within its own range of noise levels; or the mixture of all steps' samples (DMD2).",
    )
    critic_steps: int = _setting(5, "Critic updates per student update.")
    critic_rollouts: Literal["shared", "fresh"] = _setting(
        "shared",
        "Critics learn from what the student predicts at all steps of the rollouts that its update uses, or, as in "
        "DMD2, each critic update from fresh rollouts.",
    )
    critic_learning_rate: float | None = _setting(None, "Learning rate of the critics; None is twice the student's.")
    critic_lr_scheduler_type: str | None = _setting(
        None, "Schedule of the critics' learning rate; None takes the student's."
    )
    critic_lr_scheduler_kwargs: dict[str, Any] | str | None = _setting(
        None, "Options of the critics' schedule; None takes the student's, where it is of the same type."
    )
    critic_adam_beta1: float | None = _setting(None, "Adam's beta1 for the critics; None takes the student's.")
    critic_adam_beta2: float | None = _setting(None, "Adam's beta2 for the critics; None takes the student's.")
    critic_weight_decay: float | None = _setting(None, "Weight decay of the critics; None takes the student's.")
    critic_max_grad_norm: float = _setting(1.0, "Gradient clipping of the critic; 0 is none.")

    # ---- Moving average
    ema_decay: float = _setting(0.99, "Decay of the student's moving average, which is then exported; 0 is none.")

    # ---- Rewards
    reward_weights: list[float] | None = _setting(
        None, "One factor per reward, in order, on top of the weights in the spec."
    )
    scale_rewards: Literal["group", "batch", "none"] = _setting(
        "group",
        "As in TRL, whose standard deviation divides centered scores (of a tilt, its effect): the group's, that of all "
        "samples of the optimizer step (of a tilt, of the micro-batch), or none. True is 'group', False is 'none'.",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _setting(
        "sum_then_normalize",
        "As in TRL, what comes first where several rewards act by their scores: the weighted sum, in the scores' "
        "units, or the normalization of each in its groups, which is followed by one over the batch.",
    )
    reward_route: str = _setting(
        "gradient",
        "How external rewards act: by their 'gradient' where they have one and advantages elsewhere, all by "
        "'advantage', or by a 'tilt' of the teacher that the student is matched to; with exceptions, such as "
        "'tilt[ink=gradient]'.",
    )
    weighting: str = _setting(
        "fixed",
        "How much rewards count beside 'dm': 'fixed', 'balance' or 'constraint', with options such as "
        "'balance[cold_start=20,ramp=20]'.",
    )

    # ---- Rollouts
    sampler: Literal["renoise", "cps", "sde", "ode"] = _setting(
        "renoise", "Transitions of the rollouts: re-noising, CPS, Flow-GRPO's SDE, or none that are random."
    )
    eta: float = _setting(0.9, "Share of fresh noise for 'cps' (0 to 1), noise rate for 'sde'.")

    # ---- Rollouts used again
    num_iterations: int = _setting(1, "Student updates per rollout, in so many optimizer steps one after the other.")
    importance_sampling_correction: bool = _setting(
        True, "Weigh samples of an earlier student by how likely they still are."
    )
    importance_sampling_cap: float = _setting(2.0, "No importance weight is larger.")
    min_effective_sample_size: float = _setting(
        0.5, "A rollout is not used again below this share of effective samples."
    )
    ratio_reduction: Literal["sum", "mean"] = _setting(
        "sum",
        "Log-probabilities of a transition are summed over dimensions (true densities) or averaged (a trust-region "
        "surrogate).",
    )
    epsilon: float | None = _setting(
        None, "Clip range of the policy ratio; None is what suits ratio_reduction: 0.2 or, averaged, 1e-4."
    )

    # ---- Running rewards
    reward_batch_size: int | None = _setting(
        None, "Samples that rewards judge at a time, to save memory; None is the whole micro-batch."
    )
    reward_device: str | None = _setting(
        None, "Device of the rewards' own models, such as 'cuda:1'; None is the run's."
    )
    reward_offload: bool = _setting(False, "Keep the rewards' models on the CPU between uses, to save memory.")
    reward_on_error: Literal["raise", "skip"] = _setting(
        "raise", "What an exception inside a reward does: stop, or go on without that reward and count it."
    )
    reward_timeout: float | None = _setting(
        None,
        "Seconds that a call of a reward may take, a chunk of reward_batch_size at a time; then as reward_on_error "
        "says. What computes in this process is interrupted once it is back in Python, rewards of the run's models are "
        "not limited.",
    )

    eval_rewards: str | None = _setting(
        None,
        "Rewards that judge what evaluate() makes of eval_dataset and nothing else: held out, as a spec such as 'clip "
        "+ hps:v2.1'.",
    )

    # ---- Weights and memory
    student_weights: Literal["lora", "full"] = _setting(
        "lora", "What of the student is trained: LoRA adapters on the base, or a full copy of it."
    )
    start_from: str | None = _setting(
        None, "Folder of a finished student of the same base, to start from it; None is the base itself."
    )
    critic_weights: Literal["lora", "full"] = _setting(
        "lora", "What of the critics is trained: LoRA adapters on the base, or full copies."
    )
    quantization: Literal["none", "8bit", "4bit"] = _setting(
        "none", "Load the frozen base in 8 or 4 bits (bitsandbytes) and train adapters on it (QLoRA)."
    )
    text_encoders: Literal["keep", "offload", "drop"] = _setting(
        "keep", "Text encoders between uses: on the device, on the CPU, or gone once all prompts are encoded."
    )
    prompt_cache: str | None = _setting(
        None, "Folder to keep encoded prompts in, for later starts too; None is memory."
    )
    vae_offload: bool = _setting(False, "Keep the VAE on the CPU between uses.")
    vae_slicing: bool = _setting(False, "Decode one image at a time, to save memory.")
    vae_tiling: bool = _setting(False, "Decode in overlapping tiles, blended, to save memory.")

    # ---- Looking at the run
    log_images: int = _setting(0, "Write a grid of student, teacher and critic x_0 every so many steps; 0 is never.")
    log_images_limit: int | None = _setting(
        None, "How many of them to keep: the first, the last, and evenly in between."
    )
    log_images_filter: str | None = _setting(
        None, "A reward and its least score, as in 'safety >= 0.9': others are shown gray."
    )
    watch: Literal["warn", "stop", "off"] = _setting(
        "warn",
        "Where a reward is gamed, samples become alike, the student drifts or the critic lags: say so, or end the run "
        "as well. It looks at every log.",
    )

    def __post_init__(self) -> None:
        given: object = self.scale_rewards
        if isinstance(given, bool):
            self.scale_rewards = "group" if given else "none"
        settle_types(self)
        check_rules(self)
        check_together(self)
        check_inherited(self)
        make_weighting(self.weighting)  # so that a typo is found here
        parse_route(self.reward_route)
        name_checkpointing(self)
        try:
            with sharding_of_ours(self):
                super().__post_init__()  # type: ignore[no-untyped-call]
        except (ValueError, ImportError) as error:  # transformers' own checks
            raise ConfigError(" ".join(str(error).split())) from error
        if self.lr_scheduler_type != SchedulerType.POLYNOMIAL and self.lr_scheduler_kwargs == SQUARE:
            self.lr_scheduler_kwargs = None

    @property
    def sizes(self) -> list[tuple[int | None, int | None]]:
        """Height and width in pixels of every resolution; None means the model's own."""
        if self.resolutions is None:
            return [(self.height, self.width)]
        return [parse_resolution(resolution) for resolution in self.resolutions]

    @property
    def steps_told(self) -> int:
        """K, if critics are told which of the student's K steps made a sample; 0 if not, or if there is but one."""
        return self.num_inference_steps if self.matching in ("step", "path") and self.num_inference_steps > 1 else 0

    @property
    def num_random_steps(self) -> int:
        """How many steps of a trajectory have a density."""
        return 0 if self.sampler == "ode" else self.num_inference_steps - 1

    @property
    def clip_range(self) -> float:
        """The clip range of the policy ratio: `epsilon`, or what suits the reduction of its logarithm."""
        return CLIP_RANGES[self.ratio_reduction] if self.epsilon is None else self.epsilon


CLIP_RANGES = {"sum": 0.2, "mean": 1e-4}
"""PPO's for true ratios (arXiv 1707.06347); Flow-GRPO's (2505.05470) for averaged ones, smaller by the dimension."""
