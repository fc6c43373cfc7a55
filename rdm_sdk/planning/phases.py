"""What is alive at the same time in a training step, phase by phase, as `training/step.py` takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from transformers.training_args import OptimizerNames

from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.planning.footprint import bytes_of_all
from rdm_sdk.planning.rehearsal import Rehearsal, Tape
from rdm_sdk.rewards.resolve import RunReward, carried_back
from rdm_sdk.training.config import RDMConfig

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Phase:
    """What is alive in one phase of a run beside the weights that always are, in bytes."""

    name: str
    activations: int = 0
    """Samples, conditions, graphs and passing results."""
    gradients: int = 0
    """Of parameters."""
    vae: bool = False
    """Whether a VAE that waits on the CPU is on the device."""
    encoders: bool = False
    """Whether text encoders that wait on the CPU, or are to be dropped, are on the device."""
    rewards: bool = False
    """Whether rewards that wait on the CPU are on the device."""
    trained: bool = True
    """Whether there are optimizer states and a moving average yet."""


class Step:
    """The phases of a run's optimizer step.

    Args:
        rehearsal: of the run's model, with its roles.
        args: the run's settings.
        rewards: the run's rewards, made or declared.
    """

    def __init__(self, rehearsal: Rehearsal, args: RDMConfig, rewards: Sequence[RunReward]) -> None:
        self.rehearsal, self.args = rehearsal, args
        self.count = args.per_device_train_batch_size
        roles = rehearsal.family.roles
        self.critics = [role for role in roles.denoising_roles if role != STUDENT]
        self.heads = list(roles.heads)
        self.reuses = args.num_iterations > 1
        self.micro_batches = args.gradient_accumulation_steps
        scores_teach = any(own.weight and own.route == "advantage" for own in rewards)
        self.early = [own for own in rewards if scores_teach and own.route == "advantage"]
        """Rewards that score finished trajectories, before there is a graph."""
        self.late = [own for own in rewards if own not in self.early]
        """Rewards that judge while the student's graph waits for them."""

    def phases(self) -> Iterator[Phase]:
        """Yield the phases of which one holds the most."""
        args, held = self.args, self._samples_held()
        if args.text_encoders == "drop":
            yield Phase("start, all prompts are encoded", encoders=True, trained=False)
        if args.text_encoders == "offload":
            yield Phase("encoding prompts", held, encoders=True)
        yield Phase("rolling the student out", held + self.rehearsal.predict(STUDENT, self.count))
        yield from self._judging(self.early, held, 0)
        tape = self._tape(STUDENT)
        # When rollouts are used again, the graphs of all micro-batches wait while the critics learn.
        waiting = tape.kept * self.micro_batches if self.reuses else 0
        yield from self._critics(held + waiting)
        held += max(waiting - tape.kept, 0)
        # From the second micro-batch on, the gradients of those before are there.
        gradients = self._gradients(STUDENT) if self.micro_batches > 1 else 0
        yield from self._judging(self.late, held + tape.kept, gradients)
        # What rewards have said by then: a gradient each, the same divided by its statistic, their sum twice.
        said = 2 * (sum(own.route != "advantage" for own in self.late) + 1) * self._latents
        yield from self._trained("the student", STUDENT, held + said, gradients)
        yield Phase("the optimizer's step", held + self._scratch(STUDENT), self._gradients(STUDENT))

    @property
    def _checkpointing(self) -> bool:
        return bool(self.args.activation_checkpointing)

    @property
    def _latents(self) -> int:
        """Bytes of a micro-batch's latents."""
        return self.count * prod(self.rehearsal.shape) * FLOAT32

    def _samples_held(self) -> int:
        """Return the bytes of the rollouts and conditions that a step keeps, and those that wait to be used again."""
        trajectory = 2 * self.args.num_inference_steps + 1  # states, predictions, and x_0
        condition = bytes_of_all(self.rehearsal.condition(self.count).values())
        waiting = self.args.reuse_interval if self.reuses else 0
        return (1 + waiting) * self.micro_batches * (trajectory * self._latents + condition)

    def _critics(self, held: int) -> Iterator[Phase]:
        """Yield the updates of the critics; their gradients are there together until the optimizer's step."""
        everyone = self._gradients(*self.critics, *self.heads)
        there = everyone if self.micro_batches > 1 else 0
        for role in self.critics:
            yield from self._trained(f"the critic {role!r}", role, held, there)
            there += 0 if self.micro_batches > 1 else self._gradients(role)
        for role in self.heads:  # on the features of real images and of samples
            images = self.rehearsal.encode(self.count, self.args.vae_slicing, self.args.vae_tiling)
            yield Phase(f"real images are encoded for {role!r}", held + images, there, vae=True)
            yield Phase(f"training {role!r}", held + self.rehearsal.predict(TEACHER, self.count), there)
        if everyone:
            scratch = self._scratch(*self.critics, *self.heads)
            yield Phase("the critics' optimizer step", held + scratch, everyone)

    def _trained(self, who: str, role: str, held: int, there: int) -> Iterator[Phase]:
        """Yield a role's forward and backward pass, beside gradients that are `there` before."""
        tape = self._tape(role)
        yield Phase(f"the forward pass of {who}", held + tape.forward, there)
        new = 0 if self.micro_batches > 1 else min(self._gradients(role), tape.backward)
        yield Phase(f"the backward pass of {who}", held + tape.backward - new, there + new)

    def _tape(self, role: str) -> Tape:
        return self.rehearsal.train(role, self.count, self._checkpointing, self.micro_batches > 1)

    def _judging(self, rewards: Sequence[RunReward], held: int, gradients: int) -> Iterator[Phase]:
        """Yield how rewards judge: first those that ask the networks, then those that look at images."""
        carried = carried_back(rewards)
        if carried:  # the teacher's graph waits until all have judged, one per renoising draw
            teacher = self.rehearsal.carry_back(self.count, self._checkpointing, self._guided)
            waiting = (self.args.num_draws - 1) * teacher.kept
            yield Phase("the teacher's pass, whose graph is kept", held + waiting + teacher.forward, gradients)
            held += self.args.num_draws * teacher.kept
        asking = [own for own in rewards if own.capabilities.needs_models]
        for own in asking:
            trains = own.capabilities.trains
            if trains in self.heads:
                peak = self.rehearsal.features(self.count, self._checkpointing)
            # A reward without a critic contrasts the teacher with and without the prompt; if another reward has asked
            # for the one already, the other comes from a pass of its own.
            elif self._guided or (trains is None and own is asking[0]):
                peak = self.rehearsal.predict_pair(self.count)
            else:
                peak = self.rehearsal.predict(TEACHER, self.count)
            if trains in self.critics:
                peak = max(peak, self.rehearsal.predict(str(trains), self.count))
            yield Phase(f"the reward {own.label!r} asks the networks", held + peak, gradients, rewards=True)
        looking = [own for own in rewards if own not in asking and own.capabilities.space == "pixel"]
        if looking:
            differentiated = any(own.weight and own.differentiated for own in looking)
            yield Phase(
                f"images are decoded {'and differentiated ' if differentiated else ''}for "
                f"{', '.join(repr(own.label) for own in looking)}",
                held + self._decode(self._chunk(rewards), differentiated),
                gradients,
                vae=True,
                rewards=True,
            )
        if carried:
            backward = held - teacher.kept + teacher.backward
            yield Phase("rewards' gradients are carried back through the teacher", backward, gradients)

    def _chunk(self, rewards: Sequence[RunReward]) -> int:
        """Return how many samples are judged at a time, as `evaluate_rewards` does it."""
        size = min(self.args.reward_batch_size or self.count, self.count)
        if any(own.capabilities.scope == "group" for own in rewards):
            size = -(-size // self.args.num_generations) * self.args.num_generations
        return size

    @property
    def _guided(self) -> bool:
        return self.rehearsal.family.guidance == "classifier-free" and self.args.guidance_scale != 1.0

    def _decode(self, count: int, differentiated: bool) -> int:
        slicing, tiling = self.args.vae_slicing, self.args.vae_tiling
        if differentiated:
            return self.rehearsal.decode_to_differentiate(count, slicing, tiling).peak
        return self.rehearsal.decode(count, slicing, tiling)

    def _gradients(self, *roles: str) -> int:
        return sum(bytes_of_all(self.rehearsal.family.roles.parameters_of(role).values()) for role in roles)

    def _scratch(self, *roles: str) -> int:
        """Return what the optimizer's step makes and lets go of: one more copy of the gradients, unless it is fused."""
        fused = OptimizerNames(self.args.optim).value not in ("adamw_torch", "adagrad", "rmsprop")
        return 0 if fused and not self.args.ema_decay else self._gradients(*roles)
