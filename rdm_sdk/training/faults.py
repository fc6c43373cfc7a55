"""Who made the first value that is not finite: noted without waiting for the device, and asked when a step fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rdm_sdk.errors import RDMError
from rdm_sdk.files import replacing
from rdm_sdk.rewards.context import TEACHER, DiffusionContext
from rdm_sdk.types import Condition, Denoiser

if TYPE_CHECKING:
    from rdm_sdk.training.models import RunModels
    from rdm_sdk.training.rollouts import Rollouts

FOLDER = "fault"
"""Below `output_dir`: what the latest step that failed was doing."""


@dataclass(frozen=True)
class _Call:
    """One evaluation of a network, as flags that stay on the device."""

    role: str
    finite_before: Tensor
    """Whether each sample's x_t was finite, bool `[n]`."""
    finite_after: Tensor
    """Whether its x_0 was, bool `[n]`."""
    sigma: Tensor
    marks: Tensor
    """A number per sample that tells its prompt, `[n]`."""


@dataclass(frozen=True)
class Fault:
    """The first value of a step that is not finite."""

    role: str
    """Whose network."""
    what: str
    """"prediction", or "input" if the network was given it."""
    sigma: float
    prompt: str
    samples: int
    """How many samples of that evaluation have one."""
    count: int
    """How many there are in all."""

    def __str__(self) -> str:
        subject = f"the {self.role}'s prediction" if self.what == "prediction" else f"what the {self.role} is given"
        return (
            f"{subject} is not finite for {self.samples} of {self.count} samples, the first at sigma "
            f"{self.sigma:.4g} for the prompt {self.prompt!r}"
        )


class FiniteWatch:
    """Takes down, for every evaluation of an optimizer step, which samples were finite before and after it.

    The flags are computed where the samples are, and nobody waits for them unless the step fails.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] | None = None

    def begin(self) -> None:
        """Forget what was taken down, and take down what follows."""
        self._calls = []

    def end(self) -> None:
        """Forget it, and take down nothing until the next `begin`."""
        self._calls = None

    def watched(self, role: str, condition: Condition, denoise: Denoiser) -> Denoiser:
        """Return the same denoiser, watched."""
        if self._calls is None:
            return denoise
        tell_apart = marks(condition)

        def watching(x_t: Tensor, sigma: Tensor) -> Tensor:
            x_0 = denoise(x_t, sigma)
            self._take_down(role, tell_apart, x_t, sigma, x_0)
            return x_0

        return watching

    def watched_context(self, context: DiffusionContext, condition: Condition) -> DiffusionContext:
        """Return the same context, whose teacher is watched in its further forms too."""
        pair, unprompted = context.denoiser_pair, context.unprompted
        if self._calls is None or pair is None or unprompted is None:
            return context
        tell_apart = marks(condition)

        def watching(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            both = pair(x_t, sigma)
            self._take_down(TEACHER, tell_apart, x_t, sigma, both[0] + both[1])
            return both

        return replace(context, denoiser_pair=watching, unprompted=self.watched(TEACHER, condition, unprompted))

    @torch.no_grad()
    def _take_down(self, role: str, tell_apart: Tensor, x_t: Tensor, sigma: Tensor, x_0: Tensor) -> None:
        if self._calls is not None:
            self._calls.append(_Call(role, _finite(x_t), _finite(x_0), sigma, tell_apart))

    def first(self, prompts: Sequence[str], encode: Callable[[Sequence[str | None]], Condition]) -> Fault | None:
        """Return the first fault since `begin`, None if every value was finite; waits for the device.

        It names one of the step's prompts, by what the networks are told of each.
        """
        for call in self._calls or ():
            for what, finite in (("input", call.finite_before), ("prediction", call.finite_after)):
                bad = (~finite).nonzero()[:, 0].tolist()
                if bad:
                    names = list(dict.fromkeys(prompts))
                    distance = (marks(encode(names)) - call.marks[bad[0]]).abs()
                    prompt = names[int(distance.argmin())]
                    return Fault(call.role, what, float(call.sigma[bad[0]]), prompt, len(bad), len(finite))
        return None


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().reshape(len(values), -1).all(1)


def marks(condition: Condition) -> Tensor:
    """Return a number per sample `[N]` that differs between prompts: the sum of what their networks are told."""
    rows = [tensor.reshape(len(tensor), -1) for tensor in condition.values()]
    return torch.stack([values.sum(1, dtype=torch.float64) for values in rows]).sum(0)


def explained(error: RDMError, models: RunModels, rollouts: Rollouts, step: int, output_dir: str) -> RDMError:
    """Return what to raise for an error of a step: one that names the first value that is not finite, if any is.

    What the step was doing is then written to `<output_dir>/fault`: `fault.json`, and the samples that it had
    (`batch.safetensors`), in place of what an earlier fault left there. Of several processes, each that has such a
    value writes into a folder of its own in there. Steps are counted from 1.
    """
    prompts = [prompt for batch in rollouts.window for prompt in batch["prompts"]]
    fault = models.watch.first(prompts, models.encode)
    models.watch.end()
    if fault is None:
        return error
    folder, processes = Path(output_dir) / FOLDER, rollouts.processes
    if processes.count > 1:  # or the samples of one would stand beside the facts of another
        folder = folder / f"process-{processes.index}"
    facts = {"step": step, "error": str(error), "fault": asdict(fault), "prompts": prompts}
    try:
        _write(folder, facts, rollouts)
        told = f"The step's samples are in {folder}"
    except (OSError, RuntimeError, SafetensorError) as failure:  # what the step failed of is what must be told
        told = f"The step's samples could not be written to {folder} ({type(failure).__name__}: {failure})"
    return RDMError(
        f"{fault}, in optimizer step {step}, which was not taken ({error}). {told}; the "
        "same run with resume_from_checkpoint='latest' repeats it bit for bit"
    )


def _write(folder: Path, facts: dict[str, Any], rollouts: Rollouts) -> None:
    """Write what a failed step was doing, and the samples that it had."""
    tensors: dict[str, Tensor] = {}
    for number, experience in enumerate(rollouts.experiences):
        rollout = experience.rollout
        named = {"states": rollout.states, "x_0": rollout.x_0, "steps": experience.steps, "weights": experience.weights}
        tensors |= {f"{number}.{name}": tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    with replacing(folder / "batch.safetensors") as path:
        save_file(tensors, path)
    with replacing(folder / "fault.json") as path:
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
