"""What to switch on when a run does not fit into its device's memory: each switch is planned alone, none is guessed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from peft import LoraConfig
from transformers.training_args import OptimizerNames

from rdm_sdk.errors import RDMError
from rdm_sdk.planning.plan import GB, PlannedRun

WORTH_SAYING = 0.005
"""Share of the total that a switch must save."""


class Switch(NamedTuple):
    """A change of a run that may save memory, by the name of its flag."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"--{self.name}" + ("" if self.value is True else f" {self.value}")


class Saving(NamedTuple):
    """What a switch saves by itself, in bytes, and whether that is enough."""

    switch: Switch
    saved: int
    fits: bool


def switched(run: PlannedRun, switch: Switch) -> PlannedRun:
    """Return a run with a switch on."""
    if switch.name != "lora_r":
        args = copy.copy(run.args)
        setattr(args, *switch)
        return replace(run, args=args)
    student, critic = copy.deepcopy((run.peft_config, run.fake_peft_config))
    if student is None and critic is None:
        student = LoraConfig(lora_alpha=16)
    for lora in filter(None, (student, critic)):
        lora.r = switch.value
    return replace(run, peft_config=student, fake_peft_config=critic)


def switches(run: PlannedRun) -> list[Switch]:
    """Return all that can be changed about a run; some of it may not be possible with its model."""
    args = run.args
    weights = args.student_weights, args.critic_weights
    rank = next((int(lora.r) for lora in (run.peft_config, run.fake_peft_config) if lora), 16)
    # About half the batch, while its groups stay whole.
    batch = args.per_device_train_batch_size // args.num_generations // 2 * args.num_generations
    table = [
        ("activation_checkpointing", True, not args.activation_checkpointing),
        ("text_encoders", "offload", args.text_encoders == "keep"),
        ("text_encoders", "drop", args.text_encoders != "drop"),
        ("vae_offload", True, not args.vae_offload),
        ("vae_slicing", True, not args.vae_slicing),
        ("reward_offload", True, not args.reward_offload),
        ("student_weights", "lora", args.student_weights == "full"),
        ("critic_weights", "lora", args.critic_weights == "full"),
        ("quantization", "8bit", args.quantization == "none" and "full" not in weights),
        ("quantization", "4bit", args.quantization == "none" and "full" not in weights),
        ("optim", "adamw_8bit", "8bit" not in OptimizerNames(args.optim).value),
        ("lora_r", rank // 2, rank >= 8 and "lora" in weights),
        ("reward_batch_size", 1, args.reward_batch_size != 1),
        ("reward_route", "advantage", args.reward_route == "gradient"),  # no gradient through the VAE
        ("per_device_train_batch_size", batch, batch > 0),
    ]
    return [Switch(name, value) for name, value, changes in table if changes]


def advise(run: PlannedRun, memory: int) -> list[Saving]:
    """Return what each switch of a run would save, those that save anything, the largest first.

    `memory` is what it must fit into, in bytes.
    """
    before, savings = run.plan().total, []
    for switch in switches(run):
        try:
            total = switched(run, switch).plan().total
        except RDMError:  # the model or another setting does not allow it
            continue
        savings.append(Saving(switch, before - total, total <= memory))
    return sorted((one for one in savings if one.saved > WORTH_SAYING * before), key=lambda one: -one.saved)


def show_advice(savings: Sequence[Saving]) -> str:
    """Return the savings as a table."""
    if not savings:
        return "no switch saves anything; take a larger device, or smaller images"
    width = max(len(str(one.switch)) for one in savings)
    lines = [f"  {one.switch!s:<{width}}  {one.saved / GB:6.2f} GB{', then it fits' * one.fits}" for one in savings]
    return "\n".join(["what each of these would save by itself:", *lines])
