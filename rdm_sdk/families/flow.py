"""What rectified-flow families share: continuous noise levels, and a shifted grid of the flow-matching scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, prod
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.features import middle
from rdm_sdk.method.noise import FlowSchedule


class FlowFamily(ModelFamily):
    """A transformer that predicts the flow eps - x_0 at any noise level.

    Raises:
        ModelError: the pipeline's scheduler is not one of `schedulers`.
    """

    component = "transformer"
    schedule = FlowSchedule()
    prediction = "flow"
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """Classes of the schedulers that the family's pipelines come with."""

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        if type(pipeline.scheduler).__name__ not in self.schedulers:
            raise ModelError(
                f"{type(pipeline).__name__} needs a {' or '.join(self.schedulers)}; got "
                f"{type(pipeline.scheduler).__name__}. Load the pipeline with its own scheduler; the student gets one "
                "that suits it."
            )

    def check_length(self, least: int, most: int) -> None:
        """Raise `ConfigError` unless the run's tokens per prompt (`max_sequence_length`) are from `least` to `most`."""
        if not least <= self.max_sequence_length <= most:
            raise ConfigError(
                f"max_sequence_length={self.max_sequence_length} is not between {least} and {most}, which "
                f"{type(self.pipeline).__name__} takes; None means {self.call_length}"
            )

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return size, size

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Return the noise levels `[N]` on the scheduler's scale, 0 to 1000."""
        steps: int = self.pipeline.scheduler.config.num_train_timesteps
        return sigma * steps

    def base_shift(self, shape: Sequence[int]) -> float | None:
        config = self.pipeline.scheduler.config
        if config.use_dynamic_shifting:
            raise ModelError(
                f"the scheduler of {self.base_name!r} shifts its grid by what the pipeline call tells it, and "
                f"{type(self).__name__} does not say how; override base_shift(), and set_grid() if the call sets it"
            )
        shift: float = config.shift
        return shift

    def student_scheduler(
        self, num_steps: int, shift: float | None, stochastic: bool = True
    ) -> FlowMatchEulerDiscreteScheduler:
        if shift is None:
            shift = self.base_shift(self.latent_shape())
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=self.pipeline.scheduler.config.num_train_timesteps,
            shift=shift,
            # The default grid ends next to zero, where a re-noising step is wasted. Stretching it to the terminal level
            # of a uniform grid gives, without shift, 1, 3/4, 1/2, 1/4 for four steps.
            shift_terminal=None if num_steps == 1 else shifted(1 / num_steps, shift or 1.0),
            stochastic_sampling=stochastic,
        )

    def feature_block(self) -> nn.Module:
        blocks: Any = getattr(self.backbone, "transformer_blocks", None)
        if blocks is None:
            return super().feature_block()
        return middle(blocks)

    @property
    def feature_width(self) -> int:
        width = getattr(self.backbone, "inner_dim", None)
        return super().feature_width if width is None else int(width)


class PackedFlowFamily(FlowFamily):
    """A flow on tokens of 2 x 2 latents, whose grid the pipeline call shifts by the number of tokens."""

    @property
    def latent_channels(self) -> int:
        return int(self.backbone.config.in_channels) // 4

    @property
    def size_unit(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def base_shift(self, shape: Sequence[int]) -> float | None:
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return super().base_shift(shape)
        mu = self.dynamic_mu(prod(shape[-2:]) // 4)
        return mu if config.time_shift_type == "linear" else exp(mu)

    def dynamic_mu(self, tokens: int) -> float:
        """Return the logarithm of the shift for a number of tokens: linear between the scheduler's two ends."""
        config = self.pipeline.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu: float = config.base_shift + slope * (tokens - config.base_image_seq_len)
        return mu

    def set_grid(self, scheduler: Any, num_steps: int) -> None:
        scheduler.set_timesteps(sigmas=[(num_steps - k) / num_steps for k in range(num_steps)])

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents `[N, C, h, w]` as tokens `[N, h w / 4, 4 C]`: channels first, then the place in the token."""
        count, channels, height, width = latents.shape
        squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
        return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens `[N, h w / 4, 4 C]` as latents `[N, C, h, w]`: the inverse of `PackedFlowFamily.pack`."""
    count, _, channels = tokens.shape
    squares = tokens.reshape(count, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, height, width)


def shifted(sigma: float, shift: float) -> float:
    """Return a noise level of the uniform grid after the timestep shift (Stable Diffusion 3, arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)
