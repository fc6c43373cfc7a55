"""What travels between the parts: frozen dataclasses with a shape for each field.

`P` prompts, `G` samples per prompt, `N = P G` samples in group-major order, `K` student steps, `x` a sample's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(x_t [N, *x], sigma [N]) -> x_0 [N, *x]`, its condition closed over."""

Condition: TypeAlias = dict[str, Tensor]
"""What a prompt encodes to: named tensors whose first dimension is the batch."""


def bytes_in(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU as a NumPy array, uint8 `[n]`, of the same memory where it is contiguous.

    A side of 1 may have any stride and be contiguous, but bytes are only seen where the stride is 1.
    """
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy()


def read_all(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of tensors of one value each; the device that they are on is waited for once."""
    if not scalars:
        return []
    values: list[float] = torch.stack([s.detach().to(scalars[0].device, torch.float64) for s in scalars]).tolist()
    return values


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; where it comes from the CPU's pageable memory to a GPU, nobody waits for that.

    CUDA copies such memory aside before it goes on, so the tensor need not be kept; others promise no such thing.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned())


def select(condition: Condition, rows: Tensor) -> Condition:
    """Return the given rows (int64 `[n]`) of a condition."""
    return {name: tensor[rows] for name, tensor in condition.items()}


def select_steps(trajectory: Tensor, steps: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return each sample's entry at its own step: `trajectory` `[K, N, *x]`, `steps` int64 `[n]`, `rows` int64 `[n]`.

    None for `rows` means all N, in order.
    """
    return trajectory[steps, torch.arange(len(steps), device=steps.device) if rows is None else rows]


@dataclass(frozen=True)
class Rollout:
    """Trajectories of the student, each as deep as it was followed."""

    states: Tensor
    """x_k `[K, N, *x]`, the state at each step k; x_{k+1} was drawn from the transition out of x_k. Nothing
    was drawn beyond a sample's depth, and nothing must be read there."""
    x_0: Tensor
    """What the student predicted at each state, `[K, N, *x]`; at step K - 1, the endpoint."""
    depths: Tensor
    """How many steps each sample took, int64 `[N]` in [0, K]."""


@dataclass(frozen=True)
class RewardOutput:
    """What every reward returns, distribution matching and a stranger's callable alike."""

    scores: Tensor
    """float32 `[N]`, native units, higher is better, NaN = not applicable to this sample."""
    gradient: Tensor | None = None
    """d reward / d latents `[N, *x]`, None for a reward without a gradient."""
    magnitude: Tensor | None = None
    """`[N]`, what the gradient is measured against in group statistics; None means its own mean |g|."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """What else there is to log, `[N]` each by a name of one word: its mean over the samples that the reward applies to
    becomes `<reward>/<name>`. Of rewards that bring a `field` alone."""
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    """What the reward logged itself (`RewardBatch.log`), `[N]` each, NaN for samples of which it logged nothing: its
    mean over the others becomes `rewards/<reward>/<name>`. The host puts it here."""
    applies: Tensor | None = None
    """Which samples the reward was for (`Reward.applies`), bool `[N]` on the CPU; None is all. The host puts it here;
    an asynchronous reward may return it, of those it was shown, where only whoever scores them can tell."""

    def part(self, rows: slice) -> RewardOutput:
        """Return the output of some of the samples."""
        return RewardOutput(
            self.scores[rows],
            None if self.gradient is None else self.gradient[rows],
            None if self.magnitude is None else self.magnitude[rows],
            {name: values[rows] for name, values in self.figures.items()},
            {name: values[rows] for name, values in self.logged.items()},
            None if self.applies is None else self.applies[rows],
        )


@dataclass(frozen=True)
class Samples:
    """Student samples as rewards and critics see them."""

    prompts: list[str]
    """`N` prompts, group-major."""
    columns: Mapping[str, list[object]]
    """The dataset's other columns, `N` entries each."""
    condition: Condition
    states: Tensor
    """x_k `[N, *x]`, at which the student predicted them."""
    x_0: Tensor
    """`[N, *x]`, detached."""
    steps: Tensor
    """The student's step that predicted each, int64 `[N]`."""
    weights: Tensor
    """Importance weights, `[N]`."""


@dataclass(frozen=True)
class Experience:
    """One micro-batch of student samples, used `plan.shape[0]` times: once per optimizer step."""

    prompts: list[str]
    """`N` prompts, group-major."""
    columns: Mapping[str, list[object]]
    """The dataset's other columns, `N` entries each."""
    condition: Condition
    rollout: Rollout
    plan: Tensor
    """The step k that each sample of all processes is trained at in each use, int64 `[num_iterations, processes N]`."""
    use: int
    """Which use this is, from 0."""
    x_0: Tensor
    """The student's x_0 `[N, *x]` at this use's states: in the first use from the rollout, afterwards predicted anew,
    with its graph."""
    weights: Tensor
    """Importance weights of this use's states, `[N]`; exactly 1 in the first use."""
    scored: Mapping[str, RewardOutput]
    """What the scored rewards said of the endpoints; asked once per rollout."""
    start: int = 0
    """Where these N are among the samples of all processes."""

    @property
    def steps(self) -> Tensor:
        """Return the steps k of this use, int64 `[N]`."""
        return self.plan[self.use, self.start : self.start + len(self.prompts)]

    @property
    def states(self) -> Tensor:
        """Return the states x_k `[N, *x]` at this use's steps."""
        return select_steps(self.rollout.states, self.steps)

    @property
    def samples(self) -> Samples:
        """Return what the student predicts at this use's states."""
        return self._samples(self.states, self.x_0.detach(), self.steps)

    def samples_at(self, steps: Tensor) -> Samples:
        """Return what the student predicted in the rollout at steps k (int64 `[N]`), which it must have reached."""
        return self._samples(select_steps(self.rollout.states, steps), select_steps(self.rollout.x_0, steps), steps)

    def _samples(self, states: Tensor, x_0: Tensor, steps: Tensor) -> Samples:
        return Samples(self.prompts, self.columns, self.condition, states, x_0, steps, self.weights)
