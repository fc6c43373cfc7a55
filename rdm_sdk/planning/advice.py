"""What to switch on when a run does not fit into its device's memory: each switch is planned, none is guessed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers.training_args import OptimizerNames

from rdm_sdk.errors import RDMError
from rdm_sdk.planning.plan import GB, MemoryPlan, Planner
from rdm_sdk.rewards.resolve import RewardFuncs
from rdm_sdk.training.config import RDMConfig

WORTH_SAYING = 0.005
"""Share of the total that a switch must save."""


@dataclass(frozen=True)
class Switch:
    """A change of a run that may save memory."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of `RDMConfig`."""
    rank: int | None = None
    """LoRA rank of student and critics."""

    @property
    def touches(self) -> set[str]:
        return {*self.settings, *(["lora_r"] if self.rank is not None else [])}

    def __str__(self) -> str:
        given = dict(self.settings) | ({} if self.rank is None else {"lora_r": self.rank})
        names = {"per_device_train_batch_size": "batch"}
        return " ".join(
            f"--{names.get(name, name)}" + ("" if value is True else f" {value}") for name, value in given.items()
        )


@dataclass(frozen=True)
class Advice:
    """How a run could be made to fit."""

    alone: tuple[tuple[Switch, int], ...]
    """What saves anything by itself, with how many bytes, the largest first."""
    together: tuple[Switch, ...]
    """Those that were switched on one after the other until the run fits, or all that help."""
    plan: MemoryPlan
    """With all of `together`."""
    fits: bool

    def __str__(self) -> str:
        if not self.together:
            return "no switch saves anything; take a larger device, or smaller images"
        lines = ["what each of these would save by itself:"]
        width = max(len(str(switch)) for switch, _ in self.alone)
        lines += [f"  {switch!s:<{width}}  {saved / GB:6.2f} GB" for switch, saved in self.alone]
        all_of_them = " ".join(map(str, self.together))
        lines.append(
            f"together, {all_of_them} leaves {self.plan.total / GB:.2f} GB"
            + ("" if self.fits else ", which is still too much; take a larger device, or smaller images")
        )
        return "\n".join(lines)


class Run:
    """A run to be planned with switches on: the arguments of `plan_memory`."""

    def __init__(
        self,
        planner: Planner,
        args: RDMConfig,
        reward_funcs: RewardFuncs = None,
        peft_config: LoraConfig | None = None,
        fake_peft_config: LoraConfig | None = None,
    ) -> None:
        self.planner, self.args, self.reward_funcs = planner, args, reward_funcs
        self.loras = peft_config, fake_peft_config

    @property
    def rank(self) -> int:
        """The student's LoRA rank."""
        return 16 if self.loras[0] is None else int(self.loras[0].r)

    def plan(self, *switches: Switch) -> MemoryPlan:
        """Return the plan with switches on; raises as `plan_memory`."""
        args, loras = copy.copy(self.args), list(self.loras)
        for switch in switches:
            for name, value in switch.settings.items():
                setattr(args, name, value)
            if switch.rank is not None:
                loras = [_with_rank(lora, switch.rank) for lora in loras]
        return self.planner.plan(args, self.reward_funcs, *loras)

    def switches(self) -> Iterator[Switch]:
        """Yield all that can be changed about the run; some of it may not be possible with this model."""
        args = self.args
        if not args.activation_checkpointing:
            yield Switch({"activation_checkpointing": True})
        places = ["keep", "offload", "drop"]
        for place in places[places.index(args.text_encoders) + 1 :]:
            yield Switch({"text_encoders": place})
        for name in ("vae_offload", "vae_slicing", "reward_offload"):
            if not getattr(args, name):
                yield Switch({name: True})
        for name in ("student_weights", "critic_weights"):
            if getattr(args, name) == "full":
                yield Switch({name: "lora"})
        if args.quantization == "none" and "full" not in (args.student_weights, args.critic_weights):
            yield Switch({"quantization": "8bit"})
            yield Switch({"quantization": "4bit"})
        if "8bit" not in OptimizerNames(args.optim).value:
            yield Switch({"optim": "adamw_8bit"})
        if self.rank >= 8 and "lora" in (args.student_weights, args.critic_weights):
            yield Switch(rank=self.rank // 2)
        if args.reward_batch_size != 1:
            yield Switch({"reward_batch_size": 1})
        smaller = self.smaller_batch(args.per_device_train_batch_size)
        if smaller:
            yield smaller

    def smaller_batch(self, size: int) -> Switch | None:
        """Return what about halves a batch while its groups stay whole; None where it is one group."""
        groups = size // self.args.num_generations // 2
        return Switch({"per_device_train_batch_size": groups * self.args.num_generations}) if groups else None


def advise(run: Run, memory: int) -> Advice:
    """Return what would make a run fit into `memory` bytes, the largest savings first."""
    before = run.plan()
    least = WORTH_SAYING * before.total
    found = ((switch, before.total - plan.total) for switch in run.switches() if (plan := _possible(run, switch)))
    alone = sorted((pair for pair in found if pair[1] > least), key=lambda pair: -pair[1])
    taken: list[Switch] = []
    plan = before
    for switch, _ in alone:
        if plan.total <= memory:
            break
        if not any(switch.touches & other.touches for other in taken):
            after = _possible(run, *taken, switch)
            if after is not None and plan.total - after.total > least:
                taken, plan = [*taken, switch], after
    while plan.total > memory:
        taken, plan, goes_on = _halve(run, taken, plan)
        if not goes_on:
            break
    return Advice(tuple(alone), tuple(taken), plan, plan.total <= memory)


def _halve(run: Run, taken: Sequence[Switch], plan: MemoryPlan) -> tuple[list[Switch], MemoryPlan, bool]:
    """Return switches and plan with half the batch, and whether that was possible."""
    name = "per_device_train_batch_size"
    size = next((switch.settings[name] for switch in taken if name in switch.settings), getattr(run.args, name))
    smaller = run.smaller_batch(int(size))
    if smaller is None:
        return list(taken), plan, False
    others = [switch for switch in taken if name not in switch.settings]
    return [*others, smaller], run.plan(*others, smaller), True


def _possible(run: Run, *switches: Switch) -> MemoryPlan | None:
    """Return the plan with switches on, None where the model or another setting does not allow them."""
    try:
        return run.plan(*switches)
    except RDMError:
        return None


def _with_rank(lora: LoraConfig | None, rank: int) -> LoraConfig:
    changed = copy.deepcopy(lora) or LoraConfig(lora_alpha=16)
    changed.r = rank
    return changed
