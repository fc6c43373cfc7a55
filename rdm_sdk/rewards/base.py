"""The reward contract: what a reward is given, what it declares and what it returns."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr
from torch import Tensor, nn

from rdm_sdk._version import __version__
from rdm_sdk.errors import RewardError, check_texts
from rdm_sdk.rewards.capabilities import Capabilities as Capabilities
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.logged import checked_figure
from rdm_sdk.rewards.spec import checked_model, is_secret
from rdm_sdk.types import RewardOutput

RESERVED_COLUMNS = ("images", "prompts")
"""What functions are given beside the columns, so that no column can be called so."""


@dataclass
class _Decoded:
    """What a batch has decoded so far."""

    images: Tensor | None = None
    tracked: tuple[Tensor, Tensor] | None = None
    """Latents that require a gradient, and the images made of them, with their graph."""


@dataclass(frozen=True, kw_only=True)
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
    """The run's models, for rewards that need them; others may be judged without it, in chunks."""
    weights: Tensor | None = None
    """Importance weights `[N]` of the samples where they come from a rollout of an earlier student; None is all 1."""
    step: int | None = None
    """The optimizer step that the samples are made for, from 0; None outside of training, `evaluate()` included."""
    logged: dict[str, Tensor] | None = field(default_factory=dict, repr=False, compare=False)
    """What the reward has logged so far, `[N]` each; None for a part of a batch, of which nobody would read it."""
    _decoded: _Decoded = field(default_factory=_Decoded, init=False, repr=False, compare=False)

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        group_size: int = 1,
        columns: Mapping[str, list[object]] | None = None,
        step: int | None = None,
    ) -> RewardBatch:
        """Return a batch of finished RGB images `[N, 3, H, W]`, float in [0, 1]; gradients are then on the images.

        Raises:
            RewardError: images that are not such a tensor, or another number of prompts.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{list(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise RewardError(f"images must be an RGB float tensor [N, 3, H, W] in [0, 1]; got {got}")
        low, high = extremes(images)
        if not (low >= 0 and high <= 1):
            raise RewardError(
                f"images must lie in [0, 1]; they span [{low:.4g}, {high:.4g}]. Divide 8-bit images by 255, map "
                "[-1, 1] by x / 2 + 0.5"
            )
        texts = [""] * len(images) if prompts is None else check_texts(prompts, "prompts", RewardError)
        if not len(images) or group_size < 1:
            raise RewardError(f"there must be at least one image, in groups of at least one; got {len(images)} images")
        if len(texts) != len(images) or len(images) % group_size:
            raise RewardError(f"{len(images)} images do not go with {len(texts)} prompts in groups of {group_size}")
        for name, values in (columns or {}).items():
            entries: object = values  # type checkers believe the annotation
            if name in RESERVED_COLUMNS or isinstance(entries, str):
                raise RewardError(
                    f"column {name!r} cannot be used: columns are lists with one entry per image, and not called "
                    f"{' or '.join(RESERVED_COLUMNS)}"
                )
            if len(values) != len(images):
                raise RewardError(f"column {name!r} has {len(values)} entries for {len(images)} images")
        batch = cls(
            latents=images.detach(),
            prompts=texts,
            group_size=group_size,
            decode=lambda pixels: pixels,
            columns=columns or {},
            step=step,
        )
        batch._decoded.images = batch.latents  # whose range has been looked at
        return batch

    def __len__(self) -> int:
        return len(self.prompts)

    def log(self, name: str, values: Tensor | Sequence[float | None] | float) -> None:
        """Log a figure of the samples: a run shows its mean as `rewards/<reward>/<name>`, `score_images` all of it.

        Of several calls with one name, the last counts.

        Args:
            name: a word.
            values: one per sample, `[N]`, None or NaN where there is none; or a number, which counts for all of them.

        Raises:
            RewardError: a name or values that cannot be logged, or a part of the batch that `score` was given.
        """
        if self.logged is None:
            raise RewardError(f"log({name!r}, ...): a part of a batch cannot log; call it on the batch that you got")
        self.logged[name] = checked_figure(name, values, len(self))

    @property
    def images(self) -> Tensor:
        """RGB images `[N, 3, H, W]`, float in [0, 1], decoded at first use and once for all rewards."""
        decoded = self._decoded
        if decoded.images is None and decoded.tracked is not None:
            decoded.images = decoded.tracked[1].detach()
        if decoded.images is None:
            with torch.no_grad():
                decoded.images = _finite(self.decode(self.latents))
        return decoded.images

    @property
    def tracked_images(self) -> Tensor:
        """The images, decoded so that `pull_back` works; `images` then takes them from here."""
        return self._tracked()[1]

    def pull_back(self, image_gradient: Tensor) -> Tensor:
        """Carry a gradient on the images `[N, 3, H, W]` back through the decoder to the latents `[N, *x]`."""
        latents, images = self._tracked()
        (gradient,) = torch.autograd.grad(images, latents, image_gradient, retain_graph=True)
        return gradient

    def _tracked(self) -> tuple[Tensor, Tensor]:
        """Return latents that require a gradient and the images made of them, decoded once."""
        if self._decoded.tracked is None:
            latents = self.latents.detach().requires_grad_()
            with torch.enable_grad():
                self._decoded.tracked = latents, _finite(self.decode(latents))
        return self._decoded.tracked

    def split(self, size: int) -> Iterator[RewardBatch]:
        """Yield the batch in chunks of `size` samples, without the diffusion context (it knows the whole batch).

        One at a time: a chunk takes its images and their graph with it when it is let go.
        """
        if size >= len(self):
            yield self
            return
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            columns = {name: values[rows] for name, values in self.columns.items()}
            yield replace(
                self,
                latents=self.latents[rows],
                prompts=self.prompts[rows],
                columns=columns,
                context=None,
                logged=None,
            )

    def select(self, picked: Sequence[int]) -> RewardBatch:
        """Return a batch of some samples, in the order of their rows; images that are decoded come along."""
        rows = torch.tensor(picked, dtype=torch.long)
        selected = replace(
            self,
            latents=self.latents[rows.to(self.latents.device)],
            prompts=[self.prompts[row] for row in picked],
            columns={name: [values[row] for row in picked] for name, values in self.columns.items()},
            weights=None if self.weights is None else self.weights[rows.to(self.weights.device)],
            logged=None,
        )
        if self._decoded.images is None and self._decoded.tracked is None:
            return selected
        return selected.with_images(self.images[rows.to(self.images.device)])

    def with_images(self, images: Tensor) -> RewardBatch:
        """Return the same batch with other images (used to differentiate with respect to them)."""
        batch = replace(self)
        batch._decoded.images = images
        return batch

    def with_latents(self, latents: Tensor) -> RewardBatch:
        """Return the same batch with other latents (used to differentiate with respect to them)."""
        return replace(self, latents=latents)

    def with_nothing_logged(self) -> RewardBatch:
        """Return the same batch, sharing what is decoded, for a reward of which nothing is logged yet."""
        batch = replace(self, logged={})
        object.__setattr__(batch, "_decoded", self._decoded)  # the dataclass is frozen for those who are given it
        return batch

    def average(self, losses: Tensor) -> Tensor:
        """Return the mean of losses `[N]` over the current student's samples: importance-weighted where need be."""
        return losses.mean() if self.weights is None else (self.weights * losses).mean()

    def require_context(self, reward: str) -> DiffusionContext:
        """Return the diffusion context, or raise if the batch was made without a model."""
        if self.context is None:
            raise RewardError(f"reward {reward!r} needs the models of a training run; in one, declare context=True")
        return self.context


def extremes(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest of some floats, both NaN if one is; 0 and 0 if there are none."""
    if not values.numel():
        return 0.0, 0.0
    low, high = torch.stack(values.detach().aminmax()).tolist()  # one wait for the device
    return low, high


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; a twentieth of the time of `isfinite().all()` on a CPU."""
    low, high = extremes(values)
    return low > -torch.inf and high < torch.inf


def _finite(images: Tensor) -> Tensor:
    """Return decoded images, or raise: some rewards would score NaN like any other picture."""
    if not images.is_meta and not all_finite(images):
        raise RewardError(
            "images hold NaN or infinite pixels, which no reward can judge: the student has diverged (lower "
            "learning_rate, or go on from an earlier checkpoint), or what decodes or made them overflows"
        )
    return images


class RewardConfig(BaseModel):
    """Base of a reward's options: a frozen pydantic model that knows every key it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def public_options(config: RewardConfig, **options: Any) -> dict[str, Any]:
    """Return a reward's options as they may be written down: without secrets, whether by type or by name.

    `options` are those of pydantic's `model_dump`.
    """
    hidden = {name for name, value in config if is_secret(name) or isinstance(value, (SecretStr, SecretBytes))}
    return config.model_dump(mode="json", exclude=hidden, **options)


class Reward(ABC):
    """A reward: higher scores are better, in any units.

    Subclasses write `score`. One that declares `gradient="autograd"` keeps `score` differentiable with respect to
    `batch.images` (or `batch.latents`, as `space` says); the host does the differentiating, and chunks, devices,
    dtypes, errors and logs besides. One that declares `gradient="field"` writes `field` and returns scores and
    gradient itself. One that `trains` a role writes `training_loss`.

    Options are the fields of a nested `Config`; `Sharpness(radius=3)`, `"acme/sharpness[radius=3]"` and
    `Sharpness(Sharpness.Config(radius=3))` are the same reward. A `Config` with a field `variant` (`revision`) takes it
    from `name:variant` (`name@revision`). Models belong in `__init__`, as `nn.Module` attributes, so that a missing
    checkpoint is found before training starts and the host can move them.

    Raises:
        RewardError: an unknown option, or a value that it cannot have.
    """

    name: str = ""
    """What logs call it; the name it is registered under, by default the class's in lower case."""
    capabilities: Capabilities
    settled_when_made: bool = False
    """Whether its options decide what it can do, so that `capabilities` are known only of the object. It is then made
    before the run is planned, so it must not load models into this process."""
    only_reads: bool = False
    """Whether it never changes in place what it is given. An asynchronous one is otherwise given a copy, because it
    works at the same time as the others."""
    may_sit_out: bool = False
    """Whether it may be for none of a batch's samples though it is shown all, as rewards are that see the run's models;
    for others `applies` tells. NaN for all is an error otherwise."""
    origin: str = ""
    """The distribution that it comes from, with its version; set by the registry."""
    preprocessing: str = "none"
    """Names what is done to the images before a model sees them; kept with the scores, which depend on it."""

    class Config(RewardConfig):
        """No options."""

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        self.name = self.name or type(self).__name__.lower()
        check_class(type(self))
        if config is not None and not isinstance(config, type(self).Config):
            raise RewardError(
                f"reward {self.name!r} takes a {type(self).Config.__qualname__} or options as keywords; got {config!r}"
            )
        if config is not None and options:
            raise RewardError(f"reward {self.name!r} takes a config or options, not both; got {', '.join(options)} too")
        if config is None:
            config = checked_model(type(self).Config, options, f"reward {self.name!r}", RewardError)
        self.config: Any = config

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        """Return which samples the reward is for, by their N prompts and the N entries of each column alone.

        By default those with an entry other than None in every column that it declares. The others are not shown to
        it: they score NaN, and a batch without any that it is for is no error. A reward that needs the run's models
        is not asked; it always sees the whole batch.
        """
        needed = [columns[name] for name in self.capabilities.columns if name in columns]
        return [all(values[row] is not None for values in needed) for row in range(len(prompts))]

    def score(self, batch: RewardBatch) -> Tensor:
        """Return scores, float32 `[N]`; NaN marks a sample to which the reward does not apply."""
        raise RewardError(f"reward {self.name!r} is asynchronous, so score_async(batch) is to be awaited instead")

    async def score_async(self, batch: RewardBatch) -> Tensor | RewardOutput:
        """Return scores `[N]`, or a `RewardOutput` of them with `applies`; for `asynchronous=True` only."""
        raise RewardError(f"reward {self.name!r} declares asynchronous=True but does not implement score_async(batch)")

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        """Return scores and their gradient on what the reward reads; for `gradient="awaited"` only.

        It is the gradient of the sum of the scores, with respect to `batch.images` `[N, 3, H, W]` (or `batch.latents`).
        """
        raise RewardError(f"reward {self.name!r} declares gradient='awaited' but does not implement gradient_async")

    def field(self, batch: RewardBatch) -> RewardOutput:
        """Return scores and the gradient with respect to `batch.latents`; for `gradient="field"` only."""
        raise RewardError(f"reward {self.name!r} declares gradient='field' but does not implement field(batch)")

    def make_head(self, feature_width: int, num_steps: int) -> nn.Module:
        """Return the module that the reward trains, for one that declares `head=True`.

        Called once per run, before training. The host trains, moves, saves and resumes it. Keep it nowhere, because a
        reward may serve several runs: `DiffusionContext.head` has it.

        Args:
            feature_width: of the teacher's features (`DiffusionContext.features`).
            num_steps: K if critics are told the step that made a sample (`DiffusionContext.steps`), 0 if they are not.
        """
        raise RewardError(f"reward {self.name!r} declares head=True but does not implement make_head")

    def training_loss(self, batch: RewardBatch) -> Tensor:
        """Return the scalar loss of the reward's trainable role on the batch; for rewards that `trains` one.

        `batch.average(losses)` weighs samples that an earlier student made.
        """
        raise RewardError(f"reward {self.name!r} declares trains={self.capabilities.trains!r} but no training_loss")

    def to(self, device: torch.device | str) -> None:
        """Move the reward's modules; by default all that `modules_of` finds."""
        for module in modules_of(self):
            module.to(device)

    def example(self) -> RewardBatch | None:
        """Return samples for the contract kit, if random images and prompts will not do: two groups of two or more."""
        return None

    def provenance(self) -> dict[str, object]:
        """Return what a score must be stored with to be comparable: reward, options, preprocessing, versions."""
        return {
            "reward": self.name,
            "options": public_options(self.config),
            "preprocessing": self.preprocessing,
            "origin": self.origin or self.defined_in(),
            "sdk_version": __version__,
        }

    def defined_in(self) -> str:
        """Return the module that the reward's code is in."""
        return type(self).__module__


def modules_of(reward: Reward) -> list[nn.Module]:
    """Return a reward's modules: all attributes that are an `nn.Module`, or a list, tuple or dict with some."""
    parts: list[object] = []
    for value in vars(reward).values():
        held = value.values() if isinstance(value, dict) else value
        parts += held if isinstance(value, (dict, list, tuple)) else [value]
    return [part for part in parts if isinstance(part, nn.Module)]


def check_class(cls: type[Reward]) -> None:
    """Raise `RewardError` for what a subclass of `Reward` must declare or write, and does not."""
    if not isinstance(getattr(cls, "capabilities", None), Capabilities):
        raise RewardError(f"{cls.__name__} must have a class attribute capabilities = Capabilities(...)")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, RewardConfig)):
        raise RewardError(f"{cls.__name__}.Config must be a subclass of rdm_sdk.RewardConfig; got {cls.Config!r}")
    needed = ["score_async" if cls.capabilities.asynchronous else "score"]
    needed += ["field"] if cls.capabilities.gradient == "field" else []
    needed += ["gradient_async"] if cls.capabilities.gradient == "awaited" else []
    needed += ["training_loss"] if cls.capabilities.trains else []
    for method in needed:
        if getattr(cls, method) is getattr(Reward, method):
            promised = (getattr(Reward, method).__doc__ or "").splitlines()[0]
            raise RewardError(f"{cls.__name__} must write {method}(self, batch), by what it declares: {promised}")
