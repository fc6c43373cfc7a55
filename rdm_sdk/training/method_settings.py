"""What the step asks of a run's settings, without the class that a Trainer needs."""

from __future__ import annotations

from typing import Literal, Protocol

from rdm_sdk.method.draws import Spread
from rdm_sdk.method.groups import Normalization, ScoreScale
from rdm_sdk.method.objective import Aggregation
from rdm_sdk.method.transitions import Reduction, TransitionKind


class MethodSettings(Protocol):
    """The settings of `RunModels`, `Judge`, `Rollouts` and `DistillationStep`.

    An `RDMConfig` has them all, with its defaults and its checks; its field of the same name says what each means.
    """

    # Models.
    num_inference_steps: int
    sampler: TransitionKind
    eta: float
    shift: float | None
    guidance_scale: float
    text_encoders: Literal["keep", "offload", "drop"]
    vae_offload: bool
    vae_slicing: bool
    vae_tiling: bool
    ema_decay: float
    seed: int
    bf16: bool

    # Rewards.
    num_generations: int
    matching: Literal["step", "path", "range", "mixture"]
    min_time: float
    max_time: float
    spread: Spread
    critic_correction: Literal["others", "none"]
    reward_batch_size: int | None
    reward_device: str | None
    reward_offload: bool
    reward_on_error: Literal["raise", "skip"]
    reward_timeout: float | None

    # Rollouts.
    num_iterations: int
    critic_rollouts: Literal["shared", "fresh"]
    importance_sampling_correction: bool
    importance_sampling_cap: float
    min_effective_sample_size: float
    ratio_reduction: Reduction

    # Losses.
    normalization: Normalization
    scale_rewards: ScoreScale
    multi_objective_aggregation: Aggregation
    critic_max_grad_norm: float

    @property
    def sizes(self) -> list[tuple[int | None, int | None]]:
        """Height and width of every resolution, None where the model's own is taken."""

    @property
    def steps_told(self) -> int:
        """K, if critics are told which of the student's steps made a sample; 0 if they are not."""

    @property
    def clip_range(self) -> float:
        """The clip range of the policy ratio."""
