"""What is alive at the same time in a training step, phase by phase, as `training/step.py` takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from transformers.training_args import OptimizerNames

from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.planning.footprint import bytes_of_all
from rdm_sdk.planning.rehearsal import Rehearsal, Tape
from rdm_sdk.rewards.evaluate import samples_at_a_time
from rdm_sdk.rewards.resolve import RunReward, carried_back
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.step_rules import is_guided, judged_at_endpoints, judged_at_replay

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Phase:
    """What is alive in one phase of a run beside the weights that always are, in bytes."""

    name: str
    activations: int = 0
    """Samples, conditions, graphs and passing results."""
    gradients: int = 0
    """Those of parameters."""
    vae: bool = False
    encoders: bool = False
    rewards: bool = False
    """Whether what else waits on the CPU, or is to be dropped, is on the device."""
    trained: bool = True
    """Whether there are optimizer states and a moving average yet."""


class Step:
    """The phases of a run's optimizer step, its rewards made or declared."""

    def __init__(self, rehearsal: Rehearsal, args: RDMConfig, rewards: Sequence[RunReward]) -> None:
        self.rehearsal, self.args, self.rewards = rehearsal, args, rewards
        self.count, self.micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.roles = rehearsal.family.roles
        self.critics = [role for role in self.roles.denoising_roles if role != STUDENT]
        self.checkpointing = bool(args.activation_checkpointing)
        self.guided = is_guided(rehearsal.family, args.guidance_scale)
        self.latents = self.count * prod(rehearsal.shape) * FLOAT32
        """Bytes of a micro-batch's latents."""

    def phases(self) -> Iterator[Phase]:
        """Yield the phases of which one holds the most."""
        args, held = self.args, self._samples_held()
        if args.text_encoders == "drop":
            yield Phase("start, all prompts are encoded", encoders=True, trained=False)
        if args.text_encoders == "offload":
            yield Phase("encoding prompts", held, encoders=True)
        yield Phase("rolling the student out", held + self.rehearsal.predict(STUDENT, self.count))
        yield from self._judging(judged_at_endpoints(self.rewards), held, 0)
        tape = self._tape(STUDENT)
        # When rollouts are used again, the graphs of all micro-batches wait while the critics learn.
        waiting = tape.kept * self.micro_batches if args.num_iterations > 1 else 0
        yield from self._critics(held + waiting)
        held += max(waiting - tape.kept, 0)
        # From the second micro-batch on, the gradients of those before are there.
        gradients = self._gradients(STUDENT) if self.micro_batches > 1 else 0
        late = judged_at_replay(self.rewards)
        yield from self._judging(late, held + tape.kept, gradients)
        # What rewards have returned by then: a gradient each, the same divided by its statistic, their sum twice.
        returned = 2 * (sum(reward.route != "advantage" for reward in late) + 1) * self.latents
        yield from self._trained("the student", STUDENT, held + returned, gradients)
        yield Phase("the optimizer's step", held + self._scratch(STUDENT), self._gradients(STUDENT))

    def _samples_held(self) -> int:
        """Return the bytes of the rollouts and conditions that a step keeps, and of those that it may use again."""
        trajectory = 2 * self.args.num_inference_steps + 1  # states, predictions, and x_0
        condition = bytes_of_all(self.rehearsal.condition(self.count).values())
        return (2 if self.args.num_iterations > 1 else 1) * self.micro_batches * (trajectory * self.latents + condition)

    def _critics(self, held: int) -> Iterator[Phase]:
        """Yield the updates of the critics; their gradients are there together until the optimizer's step."""
        trained = [*self.critics, *self.roles.heads]
        everyone = self._gradients(*trained)
        there = everyone if self.micro_batches > 1 else 0
        for role in self.critics:
            yield from self._trained(f"the critic {role!r}", role, held, there)
            there += 0 if self.micro_batches > 1 else self._gradients(role)
        for role in self.roles.heads:  # on the features of real images and of samples
            images = self.rehearsal.encode(self.count, self.args.vae_slicing, self.args.vae_tiling)
            yield Phase(f"real images are encoded for {role!r}", held + images, there, vae=True)
            yield Phase(f"training {role!r}", held + self.rehearsal.predict(TEACHER, self.count), there)
        if everyone:
            yield Phase("the critics' optimizer step", held + self._scratch(*trained), everyone)

    def _trained(self, who: str, role: str, held: int, there: int) -> Iterator[Phase]:
        """Yield a role's forward and backward pass, beside gradients that are `there` before."""
        tape = self._tape(role)
        yield Phase(f"the forward pass of {who}", held + tape.forward, there)
        new = 0 if self.micro_batches > 1 else min(self._gradients(role), tape.backward)
        yield Phase(f"the backward pass of {who}", held + tape.backward - new, there + new)

    def _tape(self, role: str) -> Tape:
        return self.rehearsal.train(role, self.count, self.checkpointing, self.micro_batches > 1)

    def _judging(self, rewards: Sequence[RunReward], held: int, gradients: int) -> Iterator[Phase]:
        """Yield how rewards judge: first those that ask the networks, then those that look at images."""
        carried = carried_back(rewards)
        if carried:  # the teacher's graph waits until all have judged
            teacher = self.rehearsal.carry_back(self.count, self.checkpointing, self.guided)
            yield Phase("the teacher's pass, whose graph is kept", held + teacher.forward, gradients)
            held += teacher.kept
        asking = [reward for reward in rewards if reward.capabilities.needs_models]
        for reward in asking:
            peak = self._asking(reward, first=reward is asking[0])
            yield Phase(f"the reward {reward.label!r} asks the networks", held + peak, gradients, rewards=True)
        looking = [one for one in rewards if one not in asking and one.capabilities.space == "pixel"]
        if looking:
            differentiated = any(reward.weight and reward.differentiated for reward in looking)
            yield Phase(
                f"images are decoded {'and differentiated ' if differentiated else ''}for "
                f"{', '.join(repr(reward.label) for reward in looking)}",
                held + self._decoding(rewards, differentiated),
                gradients,
                vae=True,
                rewards=True,
            )
        if carried:
            backward = held - teacher.kept + teacher.backward
            yield Phase("rewards' gradients are carried back through the teacher", backward, gradients)

    def _asking(self, reward: RunReward, first: bool) -> int:
        """Return the peak of what a reward asks the networks; `first` of all that ask."""
        trains = reward.capabilities.trains
        if str(trains) in self.roles.heads:
            return self.rehearsal.features(self.count, self.checkpointing)
        # A reward without a critic contrasts the teacher with and without the prompt; if another reward has asked for
        # the one already, the other comes from another pass.
        both = self.guided or (trains is None and first)
        teacher = self.rehearsal.predict_pair(self.count) if both else self.rehearsal.predict(TEACHER, self.count)
        return max(teacher, self.rehearsal.predict(str(trains), self.count) if trains in self.critics else 0)

    def _decoding(self, rewards: Sequence[RunReward], differentiated: bool) -> int:
        """Return the peak of decoding as many samples as are judged at a time."""
        args, capabilities = self.args, [reward.capabilities for reward in rewards]
        count = samples_at_a_time(capabilities, self.count, args.num_generations, args.reward_batch_size)
        decoded = min(count, self.count), args.vae_slicing, args.vae_tiling
        return self.rehearsal.differentiate(*decoded).peak if differentiated else self.rehearsal.decode(*decoded)

    def _gradients(self, *roles: str) -> int:
        return sum(bytes_of_all(self.roles.parameters_of(role).values()) for role in roles)

    def _scratch(self, *roles: str) -> int:
        """Return what the optimizer's step makes and lets go of: one more copy of the gradients, unless it is fused."""
        fused = OptimizerNames(self.args.optim).value not in ("adamw_torch", "adagrad", "rmsprop")
        return 0 if fused and not self.args.ema_decay else self._gradients(*roles)
