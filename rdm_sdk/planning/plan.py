"""How much device memory a training run takes, said before anything is loaded: from configs alone.

Weights, optimizer states and averages are counted; what the passes of a step take is measured by running them on the
meta device (`Rehearsal`). What is alive together at the peak follows the trainer's step, phase by phase.

Not counted: CUDA's own context and workspaces (about half a GB), what its allocator cannot use for being in pieces, and
what the models of external rewards save while they are differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, describe_lora
from rdm_sdk.families.targets import linear_layers
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import bytes_of, bytes_of_all, count_of
from rdm_sdk.planning.phases import Phase, Step
from rdm_sdk.planning.rehearsal import Rehearsal
from rdm_sdk.rewards.base import modules_of
from rdm_sdk.rewards.resolve import PlannedReward, RewardFuncs, plan_rewards, split_held_out
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.judge import reward_heads
from rdm_sdk.training.models import check_fits
from rdm_sdk.training.validation import check_run, role_configs

GB = 2**30
"""Bytes in what is printed as a GB, as graphics cards have them."""


class Row(NamedTuple):
    """What one part of a run takes at the peak, in bytes; None is unknown, or nothing to count."""

    role: str
    parameters: int | None
    bytes: int | None
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
        first, second, third = (max(len(line[column]) for line in lines) for column in range(3))
        shown = [f"{role:<{first}}  {count:>{second}}  {size:>{third}}  {note}" for role, count, size, note in lines]
        return "\n".join(map(str.rstrip, shown))


def _short(count: int | None) -> str:
    """Return a number of parameters as people write it, "2.03 B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count is not None and count >= size:
            return f"{count / size:.3g} {unit}"
    return "" if count is None else str(count)


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
        reward_funcs: as `RDMTrainer` takes them. A reward by its name is not made, unless it brings a head.
        peft_config: as `RDMTrainer` takes it.
        fake_peft_config: as `RDMTrainer` takes it.

    Raises:
        ConfigError, RewardError, ModelError: something cannot work, as in `RDMTrainer`.
    """
    return PlannedRun(model, args, reward_funcs, peft_config, fake_peft_config).plan()


@dataclass(frozen=True)
class PlannedRun:
    """A run that can be planned: the arguments of `plan_memory`, and what has been measured of its model."""

    model: object
    args: RDMConfig
    reward_funcs: RewardFuncs = None
    peft_config: LoraConfig | None = None
    fake_peft_config: LoraConfig | None = None
    rehearsals: dict[str, Rehearsal] = field(default_factory=dict, repr=False)
    """For equal settings, shared with the runs that `dataclasses.replace` makes of this one."""

    def plan(self) -> MemoryPlan:
        """Return what the run takes; see `plan_memory`."""
        args = self.args
        if args.fsdp:
            raise ConfigError(
                "a plan is of a process that holds the base whole; leave fsdp out, and divide the base's row by the "
                "number of processes"
            )
        found = plan_rewards(self.reward_funcs, args.reward_weights, args.reward_route, args.eval_rewards)
        rewards, held_out = split_held_out(found, args.eval_rewards)
        check_run(args, rewards, {}, held_out=held_out)
        rehearsal = self._rehearsal(rewards)
        check_fits(rehearsal.family, args)
        phases = Step(rehearsal, args, rewards).phases()
        plans = (MemoryPlan(tuple(_rows(rehearsal.family, args, found, phase)), phase.name) for phase in phases)
        return max(plans, key=lambda plan: plan.total)

    def _rehearsal(self, rewards: Sequence[PlannedReward]) -> Rehearsal:
        """Return what measures the passes of the run's roles at the largest of its sizes, made once for equal runs."""
        args = self.args
        configs = role_configs(args, rewards, self.peft_config, self.fake_peft_config)
        heads = [reward for reward in rewards if reward.capabilities.head]
        loras = {role: lora and describe_lora(lora) + str(lora.target_modules) for role, lora in configs.items()}
        named = [str(reward.term) for reward in heads]
        key = str((args.bf16, args.max_sequence_length, args.sizes, loras, named, args.steps_told))
        if key not in self.rehearsals:
            half = torch.bfloat16 if args.bf16 else None
            family = blueprint(self.model, half or torch.float32, max_sequence_length=args.max_sequence_length)
            with torch.device("meta"):
                modules = reward_heads([reward.make() for reward in heads], family, args.steps_told)
                family.add_roles(configs, dict(modules), args.steps_told)
            shape = max((family.latent_shape(*size) for size in args.sizes), key=math.prod)
            self.rehearsals[key] = Rehearsal(family, shape, half)
        return self.rehearsals[key]


def _rows(family: ModelFamily, args: RDMConfig, rewards: Sequence[PlannedReward], phase: Phase) -> Iterator[Row]:
    """Yield what each part of a run takes in a phase."""
    roles, backbone = family.roles, family.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    kind = dtype if args.quantization == "none" else f"linear layers in {args.quantization}, the rest in {dtype}"
    count = sum(parameter.numel() for name, parameter in backbone.named_parameters() if "lora_" not in name)
    yield Row("base", count, quantized_bytes(backbone, args.quantization), f"{family.component}, {kind}, frozen")
    trained: list[Tensor] = []
    for role in roles.trainable_roles:
        parameters = list(roles.parameters_of(role).values())
        kind = "head" if role in roles.heads else roles.describe(role)
        kind = f"LoRA, {kind}" if role in roles.denoising_roles and role not in roles.copies else kind
        yield Row(role, sum(map(Tensor.numel, parameters)), bytes_of_all(parameters), f"{kind}, float32")
        trained += parameters
    optimizer = OptimizerNames(args.optim).value
    states = optimizer_bytes(optimizer, trained)
    yield Row("optimizer", None, states if phase.trained or states is None else 0, optimizer)
    if args.ema_decay:
        average = bytes_of_all(roles.parameters_of(STUDENT).values()) if phase.trained else 0
        yield Row("moving average", None, average, "of the student, float32")
    yield from _frozen(family, args, phase)
    yield from _judges(args, rewards, phase)
    yield Row("gradients", None, phase.gradients, "" if phase.gradients else "none at the peak")
    yield Row("activations", None, phase.activations, "what the peak keeps and makes")


def _frozen(family: ModelFamily, args: RDMConfig, phase: Phase) -> Iterator[Row]:
    """Yield the pipeline's parts beside the backbone."""
    encoders, others = family.text_encoders(), family.frozen_parts()
    vae = {"float32": others.pop("vae")}
    others = {name: part for name, part in others.items() if name not in encoders}
    gone = "gone" if args.text_encoders == "drop" else "on the CPU"
    for role, parts, here, place in (
        ("VAE", vae, phase.vae or not args.vae_offload, "on the CPU"),
        ("text encoders", encoders, phase.encoders or args.text_encoders == "keep", gone),
        ("other parts", others, True, ""),
    ):
        if parts:
            note = ", ".join(parts) + ("" if here else f", {place} at the peak")
            yield Row(role, count_of(*parts.values()), bytes_of(*parts.values()) * here, note)


def _judges(args: RDMConfig, rewards: Sequence[PlannedReward], phase: Phase) -> Iterator[Row]:
    """Yield the rewards that have models, or may have: counted if they are made, by what they declare otherwise."""
    for reward in rewards:
        made = modules_of(reward.given) if reward.given else []
        count = count_of(*made) if made else reward.capabilities.parameters
        if count == 0:
            continue
        dtype = str(getattr(reward.config, "dtype", "float32"))  # an option of rewards with pretrained models
        size, notes = None, ["how large it is, it does not say"]
        if count is not None:
            size, notes = bytes_of(*made) if made else count * getattr(torch, dtype).itemsize, [dtype]
            if reward.term.options.get("path") is not None:
                notes.append("if what is at its path is as large as the published model")
        if args.reward_device is not None or (args.reward_offload and not phase.rewards):
            size = 0
            notes.append("on the CPU at the peak" if args.reward_device is None else f"on {args.reward_device}")
        yield Row(f"reward {reward.label}", count, size, ", ".join(notes))


def quantized_bytes(module: nn.Module, quantization: str) -> int:
    """Return how many bytes a module without its adapters takes whose linear layers are loaded by bitsandbytes.

    8 bits are a byte per weight and a float32 per output (LLM.int8, arXiv 2208.07339). 4 bits are half a byte per
    weight, a float32 per block of 64 weights and the code's 16 values per layer (NF4, arXiv 2305.14314). "none" leaves
    all as it is.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    total = bytes_of_all(tensor for name, tensor in named if "lora_" not in name)
    for layer in linear_layers(module).values() if quantization != "none" else ():
        if isinstance(layer, nn.Linear):
            weights = layer.weight.numel()
            total -= bytes_of_all([layer.weight])
            total += weights + 4 * layer.out_features if quantization == "8bit" else -(-weights // 2)
            total += 4 * (-(-weights // 64) + 16) if quantization == "4bit" else 0
    return total


OPTIMIZERS: dict[str, tuple[int, bool]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), (2, False)),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), (2, True)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"), (1, False)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, True)),
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
