"""The reward contract: what a reward is given, what it declares and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rdm_sdk.core.noise import NoiseSchedule, add_noise, draw_sigma
from rdm_sdk.errors import RewardError
from rdm_sdk.types import Denoiser, RewardOutput


@dataclass(frozen=True)
class Capabilities:
    """What a reward can do; declared by its author, never sniffed."""

    space: Literal["pixel", "latent"] = "pixel"
    """Whether it reads decoded images or latents."""
    gradient: Literal["none", "autograd", "field"] = "none"
    """"autograd": `score` is differentiable; "field": the reward computes its own gradient in `field`."""
    trains: str | None = None
    """The role (a LoRA adapter on the base model) that the reward trains with `training_loss`, if any."""
    stochastic: bool = False
    """Whether two calls on the same batch may differ."""


@dataclass(frozen=True)
class DiffusionContext:
    """What model-aware rewards see of the run: noise levels and the denoisers of the batch's prompts."""

    schedule: NoiseSchedule
    denoiser: Callable[[str], Denoiser]
    """Role name ("teacher", "student", "fake", ...) to a denoiser with the batch's prompts closed over. The teacher's
    is guided as the run says; gradients are tracked only for the role that is being trained."""
    min_sigma: float
    max_sigma: float
    num_draws: int
    """M, the renoising draws per sample and step."""

    def draw_sigma(self, num_groups: int, group_size: int, device: torch.device) -> Tensor:
        """Draw noise levels `[N]`, one per group, uniform in [min_sigma, max_sigma)."""
        return draw_sigma(num_groups, group_size, self.min_sigma, self.max_sigma, device)

    def add_noise(self, x_0: Tensor, sigma: Tensor) -> Tensor:
        """Return x_t `[N, *x]` for `x_0` `[N, *x]` at noise levels `[N]`, with fresh noise."""
        return add_noise(self.schedule, x_0, torch.randn_like(x_0), sigma)


@dataclass(frozen=True)
class RewardBatch:
    """The samples that a reward judges, group-major."""

    latents: Tensor
    """Clean latents x_0, float32 `[N, *x]`, detached."""
    prompts: list[str]
    group_size: int
    """G, the samples per prompt."""
    decode: Callable[[Tensor], Tensor]
    """Latents `[N, *x]` to RGB images `[N, 3, H, W]` in [0, 1], differentiable."""
    columns: Mapping[str, list[object]] = field(default_factory=dict)
    """The dataset's other columns, N entries each."""
    context: DiffusionContext | None = None

    @cached_property
    def images(self) -> Tensor:
        """RGB images `[N, 3, H, W]`, float in [0, 1], decoded at first use and once for all rewards."""
        if "_decoded" in self.__dict__:
            return self._decoded[1].detach()
        with torch.no_grad():
            return self.decode(self.latents)

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        latents = self.latents.detach().requires_grad_()
        return latents, self.decode(latents)

    def pull_back(self, image_gradient: Tensor) -> Tensor:
        """Carry a gradient on the images `[N, 3, H, W]` back through the decoder to the latents `[N, *x]`."""
        latents, images = self._decoded
        (gradient,) = torch.autograd.grad(images, latents, image_gradient, retain_graph=True)
        return gradient

    def with_images(self, images: Tensor) -> RewardBatch:
        """Return the same batch with other images (used to differentiate with respect to them)."""
        batch = replace(self)
        batch.__dict__["images"] = images
        return batch

    def with_latents(self, latents: Tensor) -> RewardBatch:
        """Return the same batch with other latents (used to differentiate with respect to them)."""
        return replace(self, latents=latents)

    def require_context(self, reward: str) -> DiffusionContext:
        """Return the diffusion context, or raise if the batch was made without a model."""
        if self.context is None:
            raise RewardError(f"reward {reward!r} needs the models of a training run, but this batch has none")
        return self.context


class Reward(ABC):
    """A reward: higher scores are better, in the reward's own units.

    Subclasses write `score`. One that declares `gradient="autograd"` keeps `score` differentiable with respect to
    `batch.images` (or `batch.latents`, as `space` says); the host does the differentiating. One that declares
    `gradient="field"` writes `field` and returns scores and gradient itself. One that `trains` a role writes
    `training_loss`.
    """

    name: str
    capabilities: Capabilities

    @abstractmethod
    def score(self, batch: RewardBatch) -> Tensor:
        """Return scores, float32 `[N]`; NaN marks a sample to which the reward does not apply."""

    def field(self, batch: RewardBatch) -> RewardOutput:
        """Return scores and the gradient with respect to `batch.latents`; for `gradient="field"` only."""
        raise RewardError(f"reward {self.name!r} declares gradient='field' but does not implement field(batch)")

    def training_loss(self, batch: RewardBatch) -> Tensor:
        """Return the scalar loss of the reward's trainable role on the batch; for rewards that `trains` one."""
        raise RewardError(f"reward {self.name!r} declares trains={self.capabilities.trains!r} but no training_loss")


class CallableReward(Reward):
    """A plain function as a reward: `f(images=..., prompts=..., **columns) -> list[float | None] | Tensor`.

    It is scored, never differentiated, so it acts on the student as group-normalized advantages. None marks a sample
    to which it does not apply.
    """

    capabilities = Capabilities()

    def __init__(self, function: Callable[..., object], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def score(self, batch: RewardBatch) -> Tensor:
        values = self.function(images=batch.images, prompts=batch.prompts, **batch.columns)
        if isinstance(values, Tensor):
            return values.detach().float()
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"reward function {self.name!r} must return a list of numbers (or None) or a tensor, one entry per "
                f"image; got {type(values).__name__}"
            )
        return torch.tensor([float("nan") if value is None else float(value) for value in values])
