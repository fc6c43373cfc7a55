"""How much device memory a training run takes, said before anything is loaded: from configs alone.

Weights, optimizer states and averages are counted; what the passes of a step take is measured by running them on the
meta device (`Rehearsal`). What is alive together at the peak follows the trainer's step, phase by phase.

Not counted: CUDA's own context and workspaces (about half a GB), what its allocator cannot use for being in pieces, and
what the models of external rewards save while they are differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, describe_lora
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import bytes_of, bytes_of_all, count_of
from rdm_sdk.planning.phases import Phase, Step
from rdm_sdk.planning.rehearsal import Rehearsal
from rdm_sdk.rewards.resolve import PlannedReward, RewardFuncs, plan_rewards
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.judge import reward_heads
from rdm_sdk.training.validation import role_configs

GB = 2**30
"""Bytes in what is printed as a GB, as graphics cards have them."""


@dataclass(frozen=True)
class Row:
    """What one part of a run takes at the peak."""

    role: str
    parameters: int | None
    """None where it has none, or where they are unknown."""
    bytes: int | None
    """None is unknown."""
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Device memory of one process of a run, at its peak."""

    rows: tuple[Row, ...]
    peak: str
    """What the run does when it takes most."""

    @property
    def total(self) -> int:
        """Bytes of all rows that are known."""
        return sum(row.bytes or 0 for row in self.rows)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The rows that the total lacks."""
        return tuple(row.role for row in self.rows if row.bytes is None)

    def bytes_of(self, role: str) -> int | None:
        """Return the bytes of the row with this name."""
        return next(row.bytes for row in self.rows if row.role == role)

    def __str__(self) -> str:
        lines = [("", "parameters", "GB", "")]
        for row in self.rows:
            known = "unknown" if row.bytes is None else f"{row.bytes / GB:.2f}"
            lines.append((row.role, _short(row.parameters), known, row.note))
        total = f"{'at least ' if self.unknown else ''}{self.total / GB:.2f}"
        lines.append(("total", "", total, f"at the peak: {self.peak}"))
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            f"{role:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  {note}".rstrip()
            for role, count, size, note in lines
        )


def plan_memory(
    model: object,
    args: RDMConfig,
    reward_funcs: RewardFuncs = None,
    peft_config: LoraConfig | None = None,
    fake_peft_config: LoraConfig | None = None,
) -> MemoryPlan:
    """Return what an `RDMTrainer` with these arguments takes of its device's memory, loading nothing.

    The device is taken to be a CUDA device with fused attention, whatever this machine has; on a machine without one,
    `bf16` wants `use_cpu=True` beside it. Prompts are taken to be as long as they can be, and of several resolutions
    the largest.

    Args:
        model: a hub id or a local path; only its configs are read.
        args: the run's settings.
        reward_funcs: as `RDMTrainer` takes them. A reward by its name is not made, unless it brings a head of its own.
        peft_config: as `RDMTrainer` takes it.
        fake_peft_config: as `RDMTrainer` takes it.

    Raises:
        ConfigError, RewardError, ModelError: something cannot work, as in `RDMTrainer`.
    """
    return Planner(model).plan(args, reward_funcs, peft_config, fake_peft_config)


class Planner:
    """Plans runs of one model; what was measured for one is not measured again for the next.

    Args:
        model: a hub id or a local path.
    """

    def __init__(self, model: object) -> None:
        self.model = model
        self._drafts: dict[object, _Draft] = {}

    def plan(
        self,
        args: RDMConfig,
        reward_funcs: RewardFuncs = None,
        peft_config: LoraConfig | None = None,
        fake_peft_config: LoraConfig | None = None,
    ) -> MemoryPlan:
        """Return what a run takes; see `plan_memory`."""
        rewards = plan_rewards(reward_funcs, args.reward_weights, args.reward_route)
        configs = role_configs(args, rewards, peft_config, fake_peft_config)
        draft = self._draft(args, configs, rewards)
        step = Step(draft.rehearsal(args), args, rewards)
        parts = Parts(draft, args, rewards)
        return max((parts.at(phase) for phase in step.phases()), key=lambda plan: plan.total)

    def _draft(
        self, args: RDMConfig, configs: Mapping[str, LoraConfig | None], rewards: Sequence[PlannedReward]
    ) -> _Draft:
        """Return the model with a run's roles, as it was made before if it was."""
        heads = [str(own.term) for own in rewards if own.capabilities.head]
        described = {
            role: config and describe_lora(config) + str(config.target_modules) for role, config in configs.items()
        }
        key = str((args.bf16, args.max_sequence_length, described, heads, args.steps_told))
        if key not in self._drafts:
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            family = blueprint(self.model, dtype, max_sequence_length=args.max_sequence_length)
            self._drafts[key] = _Draft(family, configs, rewards, args.steps_told)
        return self._drafts[key]


class _Draft:
    """A model with its roles, on the meta device."""

    def __init__(
        self,
        family: ModelFamily,
        configs: Mapping[str, LoraConfig | None],
        rewards: Sequence[PlannedReward],
        steps_told: int,
    ) -> None:
        self.family = family
        self.base_parameters = count_of(family.backbone)
        # Before the adapters come, whose layers are linear ones too and are not quantized.
        self.base_bytes = {bits: quantized_bytes(family.backbone, bits) for bits in ("none", "8bit", "4bit")}
        with torch.device("meta"):
            family.add_roles(
                configs,
                dict(reward_heads([own.make() for own in rewards if own.capabilities.head], family, steps_told)),
                steps_told,
            )
        self._rehearsals: dict[object, Rehearsal] = {}

    def rehearsal(self, args: RDMConfig) -> Rehearsal:
        """Return what measures the passes at the largest of a run's sizes."""
        shape = max((self.family.latent_shape(*size) for size in args.sizes), key=math.prod)
        if shape not in self._rehearsals:
            self._rehearsals[shape] = Rehearsal(self.family, shape, torch.bfloat16 if args.bf16 else None)
        return self._rehearsals[shape]


class Parts:
    """The rows of a plan."""

    def __init__(self, draft: _Draft, args: RDMConfig, rewards: Sequence[PlannedReward]) -> None:
        self.draft, self.family, self.args, self.rewards = draft, draft.family, args, rewards

    def at(self, phase: Phase) -> MemoryPlan:
        """Return the plan of a run whose peak is in a phase."""
        rows = [self._base(), *self._roles(), *self._states(phase), *self._frozen(phase), *self._judges(phase)]
        rows.append(Row("gradients", None, phase.gradients, "" if phase.gradients else "none at the peak"))
        rows.append(Row("activations", None, phase.activations, "what the peak keeps and makes"))
        return MemoryPlan(tuple(rows), phase.name)

    def _base(self) -> Row:
        args = self.args
        dtype = str(self.family.backbone.dtype).removeprefix("torch.")
        kind = dtype if args.quantization == "none" else f"linear layers in {args.quantization}, the rest in {dtype}"
        size = self.draft.base_bytes[args.quantization]
        return Row("base", self.draft.base_parameters, size, f"{self.family.component}, {kind}, frozen")

    def _roles(self) -> Iterator[Row]:
        roles = self.family.roles
        for role in roles.trainable_roles:
            parameters = roles.parameters_of(role).values()
            kind = "head" if role in roles.heads else roles.describe(role)
            if role in roles.denoising_roles and role not in roles.copies:
                kind = f"LoRA, {kind}"
            count = sum(parameter.numel() for parameter in parameters)
            yield Row(role, count, bytes_of_all(parameters), f"{kind}, float32")

    def _states(self, phase: Phase) -> Iterator[Row]:
        """Yield the optimizer's states, and the moving average."""
        roles, args = self.family.roles, self.args
        trained = [parameter for role in roles.trainable_roles for parameter in roles.parameters_of(role).values()]
        name = OptimizerNames(args.optim).value
        size = optimizer_bytes(name, trained)
        yield Row("optimizer", None, size if phase.trained or size is None else 0, name)
        if args.ema_decay:
            average = bytes_of_all(roles.parameters_of(STUDENT).values()) if phase.trained else 0
            yield Row("moving average", None, average, "of the student, float32")

    def _frozen(self, phase: Phase) -> Iterator[Row]:
        """Yield the pipeline's other parts."""
        args, parts, encoders = self.args, self.family.frozen_parts(), self.family.text_encoders()
        vae = parts["vae"]
        here = phase.vae or not args.vae_offload
        note = "float32" if here else "float32, on the CPU at the peak"
        yield Row("VAE", count_of(vae), bytes_of(vae) if here else 0, note)
        if encoders:
            here = phase.encoders or args.text_encoders == "keep"
            away = {"offload": "on the CPU at the peak", "drop": "gone at the peak"}
            note = ", ".join(encoders) + ("" if here else f", {away[args.text_encoders]}")
            yield Row("text encoders", count_of(*encoders.values()), bytes_of(*encoders.values()) if here else 0, note)
        others = {name: part for name, part in parts.items() if name not in encoders and part is not vae}
        if others:
            yield Row("other parts", count_of(*others.values()), bytes_of(*others.values()), ", ".join(others))

    def _judges(self, phase: Phase) -> Iterator[Row]:
        """Yield the rewards that have models of their own, or may have."""
        for own in self.rewards:
            count, size = reward_size(own)
            if count == 0:
                continue
            notes = ["how large it is, it does not say"] if count is None else [_dtype_of(own)]
            if own.term.options.get("path") is not None and count is not None:
                notes.append("if what is at its path is as large as the published model")
            elsewhere = self.args.reward_device is not None
            waits = self.args.reward_offload and not phase.rewards
            if elsewhere or waits:
                size = 0
                notes.append(f"on {self.args.reward_device}" if elsewhere else "on the CPU at the peak")
            yield Row(f"reward {own.label}", count, size, ", ".join(notes))


def quantized_bytes(module: nn.Module, quantization: str) -> int:
    """Return how many bytes a module takes whose linear layers are loaded in few bits by bitsandbytes.

    8 bits are a byte per weight and a float32 per output (LLM.int8, arXiv 2208.07339). 4 bits are half a byte per
    weight, a float32 per block of 64 weights and the code's 16 values per layer (NF4, arXiv 2305.14314).
    """
    total = bytes_of(module)
    if quantization == "none":
        return total
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            weights = layer.weight.numel()
            total -= bytes_of_all([layer.weight])
            total += weights + 4 * layer.out_features if quantization == "8bit" else -(-weights // 2)
            total += 4 * (-(-weights // 64) + 16) if quantization == "4bit" else 0
    return total


OPTIMIZERS: dict[str, tuple[int, bool]] = {
    "adamw_torch": (2, False),
    "adamw_torch_fused": (2, False),
    "paged_adamw_32bit": (2, False),
    "adamw_bnb_8bit": (2, True),
    "adamw_8bit": (2, True),
    "paged_adamw_8bit": (2, True),
    "lion_32bit": (1, False),
    "paged_lion_32bit": (1, False),
    "lion_8bit": (1, True),
    "paged_lion_8bit": (1, True),
    "adagrad": (1, False),
    "rmsprop": (1, False),
    "sgd": (0, False),
}
"""Optimizers of `TrainingArguments.optim`: how many states they keep per parameter, and whether in 8 bits."""


def optimizer_bytes(name: str, parameters: Sequence[Tensor]) -> int | None:
    """Return how many bytes an optimizer keeps for float32 parameters, None if that is not known here.

    8-bit states (arXiv 2110.02861) are a byte per parameter and a float32 per block of 256; bitsandbytes keeps those of
    tensors with fewer than 4,096 parameters in float32.
    """
    if name not in OPTIMIZERS:
        return None
    states, few_bits = OPTIMIZERS[name]
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        total += states * (count + 4 * -(-count // 256) if few_bits and count >= 4096 else 4 * count)
        total += 4 if name.startswith("adamw_torch") else 0  # the number of the step
    return total


def reward_size(reward: PlannedReward) -> tuple[int | None, int | None]:
    """Return how many parameters a reward's models hold, and how many bytes they take; None is unknown.

    A reward that was made is counted, one that is only declared says it (`Capabilities.parameters`).
    """
    modules = [value for value in vars(reward.given).values() if isinstance(value, nn.Module)] if reward.given else []
    if modules:
        return count_of(*modules), bytes_of(*modules)
    count = reward.capabilities.parameters
    return count, None if count is None else count * getattr(torch, _dtype_of(reward)).itemsize


def _dtype_of(reward: PlannedReward) -> str:
    """Return the dtype that a reward's weights are loaded in: rewards with pretrained models have an option for it."""
    return str(getattr(reward.config, "dtype", "float32"))


def _short(count: int | None) -> str:
    """Return a number of parameters as people write it, "2.03 B"."""
    if count is None:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
