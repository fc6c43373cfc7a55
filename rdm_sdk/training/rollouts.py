"""The student's rollouts: collected for an optimizer step, used again in later ones, kept in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rdm_sdk.errors import RDMError
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.files import replacing
from rdm_sdk.method.draws import draw_steps
from rdm_sdk.method.importance import effective_share, truncated_weights, weight_sums
from rdm_sdk.method.sampling import StudentOf, plan_steps, redraw, replay_log_ratio, rollout, state_log_ratio
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.method_settings import MethodSettings
from rdm_sdk.types import Condition, Experience, RewardOutput, Rollout, Samples, select, select_steps

Window = Sequence[dict[str, Any]]
"""The micro-batches of an optimizer step: `{"prompts": [...], "columns": {name: [...]}}`, prompts group-major."""
FIRST_RATIO_TOLERANCE = {False: 1e-3, True: 0.05}
"""How far a first log-ratio per dimension may be from 0, in float32 and in bf16."""
_FIELDS = ("plan", "weights")
_TRAJECTORY = ("states", "x_0", "depths")


class Rollouts:
    """What the student is trained on, an experience per micro-batch; holds every tensor that a step changes in place.

    Args:
        judge: scores the endpoints, where a reward acts by its scores; its models' student is rolled out.
        settings: an `RDMConfig`, or any object with the same fields.
    """

    def __init__(self, judge: Judge, settings: MethodSettings) -> None:
        self.judge, self.settings, self.processes = judge, settings, judge.processes
        self.draws = judge.randomness.draws
        self.models, self.monitor, self.policy = judge.models, judge.monitor, judge.models.policy
        self.experiences: list[Experience] = []
        """What this optimizer step trains on, one per micro-batch."""
        self.stored: list[Experience] = []
        """What the optimizer step before left to be used again."""
        self.window: Window = []
        """The micro-batches of prompts that the optimizer step is for."""
        self._predicted: dict[int, Tensor] = {}
        self._shape: tuple[int, ...] = ()

    # ---- Collecting ---------------------------------------------------------------------------------------------

    def begin(self, window: Window, step: int) -> None:
        """Take stored rollouts of these prompts for one more use, or roll the student out, for optimizer step `step`.

        `step` (from 0) decides the resolution, where a run has several. Every `num_iterations` steps begin with new
        rollouts.
        """
        if step % self.settings.num_iterations == 0:
            self.stored = []  # of other rows, even where their prompts read the same
        self.window, self._shape, self.experiences = window, self.models.step_shape(step), []
        self._predicted.clear()
        self.experiences = self._reuse(window) or [self.collect(batch) for batch in window]

    def collect(self, inputs: dict[str, Any]) -> Experience:
        """Roll the student out for a micro-batch of prompts; score the endpoints if a reward acts by its scores."""
        if not self._followed:  # the replay predicts at the state that the rollout leads to, and nobody before it
            return self._roll_out(inputs, "state")
        experience = self._roll_out(inputs, "end")
        endpoints = experience.samples_at(torch.full_like(experience.steps, self.policy.num_steps - 1))
        self.monitor.variety(endpoints.x_0, self.settings.num_generations)
        if not self.judge.uses_advantages:
            return experience
        return replace(experience, scored=self.judge.score_endpoints(endpoints))

    @property
    def _followed(self) -> bool:
        """Whether the student's rollouts are followed to their end, for scores or for critics that learn from them."""
        return self.judge.uses_advantages or self.settings.critic_rollouts == "shared"

    def _roll_out(self, inputs: dict[str, Any], until: Literal["state", "sample", "end"]) -> Experience:
        """Roll the student out for prompts, group-major, until a sample's trained state, its x_0 there, or the end."""
        settings, prompts, policy = self.settings, inputs["prompts"], self.policy
        condition = self.models.encode(prompts)
        draws, device = self.draws, self.models.device
        noise = draws.normal(len(prompts), self._shape, device)
        # A trajectory stopped at the last step has no density, so it is of no use where only scores teach.
        last = policy.num_steps if self.judge.uses_fields else policy.num_random_steps
        groups = draws.count * len(prompts) // settings.num_generations
        first = draw_steps(settings.spread, groups, settings.num_generations, last, device, draws.generator)
        plan = plan_steps(first, settings.num_iterations, last)
        depths = torch.full_like(first, policy.num_steps) if until == "end" else first + (until == "sample")
        done = rollout(self._student_of(condition), noise, depths, policy, draws)
        self.monitor.spent["rollouts"] += len(prompts)
        x_0, weights = select_steps(done.x_0, draws.mine(first)), torch.ones(len(prompts), device=device)
        start = draws.index * len(prompts)
        return Experience(prompts, inputs["columns"], condition, done, plan, 0, x_0, weights, {}, start)

    def _student_of(self, condition: Condition) -> StudentOf:
        """Return the student's denoiser by rows of a condition."""
        return lambda rows: self.models.denoiser(STUDENT, select(condition, rows))

    # ---- Using again --------------------------------------------------------------------------------------------

    def _reuse(self, window: Window) -> list[Experience] | None:
        """Return the stored rollouts of these prompts for one more use, or None if there are none or they are stale.

        The student, which has moved on since, predicts x_0 anew before the critics learn from it; the graphs of these
        predictions are kept for the student's update.
        """
        settings, stored = self.settings, self._take([batch["prompts"] for batch in window])
        if stored is None or stored[0].use + 1 >= len(stored[0].plan):
            return None
        experiences, log_ratios = [], []
        for kept, batch in zip(stored, window, strict=True):
            condition = self.models.encode(kept.prompts)
            again = replace(kept, use=kept.use + 1, columns=batch["columns"], condition=condition)
            if settings.importance_sampling_correction:
                student, steps = self._student_of(condition), again.steps
                log_ratios.append(state_log_ratio(student, again.rollout, steps, self.policy, settings.ratio_reduction))
                again = replace(again, weights=truncated_weights(log_ratios[-1], settings.importance_sampling_cap))
            experiences.append(again)
        share = self._effective_share(torch.cat(log_ratios).exp()) if log_ratios else 1.0
        goes_on = share >= settings.min_effective_sample_size  # nor if it is NaN
        self.monitor.log("ratio/stopped", 0.0 if goes_on else 1.0)
        if not goes_on:
            return None
        for position, again in enumerate(experiences):
            self._predicted[position] = self._predict(again)
            experiences[position] = replace(again, x_0=self._predicted[position].detach())
        return experiences

    def _take(self, prompts: list[list[str]]) -> list[Experience] | None:
        """Return and remove the stored rollouts of an optimizer step's prompts, None unless all processes have some."""
        if self.settings.num_iterations == 1:
            return None
        found = [one.prompts for one in self.stored] == prompts
        # Processes have different prompts; where one cannot go on, none does, or they would wait for each other.
        if not all(self.processes.gather(found)):
            return None
        stored, self.stored = self.stored, []
        return stored

    def _effective_share(self, ratio: Tensor) -> float:
        """Return the effective share of samples with these ratios `[N]`, over all processes."""
        sums = self.processes.reduce(weight_sums(ratio), "sum")
        share, mean = torch.stack([effective_share(sums), sums[0] / sums[2]]).tolist()
        self.monitor.log("ratio/ess", share)
        self.monitor.log("ratio/mean", mean)
        return float(share)

    # ---- What learns from them ----------------------------------------------------------------------------------

    def critic_samples(self, turn: int) -> list[Samples]:
        """Return what the critics learn from in one of their updates before the student's, the `turn`-th.

        New rollouts, as in DMD2, or those of the student's update, at another step of each trajectory every time: one
        of 64 then holds 64 K samples. In a later use, only what the student has predicted anew is its present self's.
        """
        if self.settings.critic_rollouts == "fresh":
            return [self._roll_out(batch, "sample").samples for batch in self.window]
        last = self.policy.num_steps
        return [one.samples if one.use else one.samples_at((one.steps + 1 + turn) % last) for one in self.experiences]

    def replay(self, position: int) -> tuple[Experience, Tensor]:
        """Return a micro-batch's experience, and the student's x_0 `[N, *x]` at this use's states, with its graph."""
        experience = self.experiences[position]
        x_0 = self._predicted.pop(position) if position in self._predicted else self._predict(experience)
        experience = self.experiences[position] = replace(experience, x_0=x_0.detach())
        return experience, x_0

    def _predict(self, experience: Experience) -> Tensor:
        student = self.models.denoiser(STUDENT, experience.condition)
        x_0 = student(experience.states, self.policy.levels(experience.steps))
        if experience.use == 0 and not self._followed:
            self.monitor.variety(x_0.detach(), self.settings.num_generations)
        if experience.use == 0 and self._followed:
            self._check_first_ratio(experience, x_0.detach())
        elif not self.judge.uses_advantages:
            # No score hangs on how these trajectories end, so the states that later uses start from are kept fresh.
            redraw(experience.rollout, x_0.detach(), experience.plan[experience.use], self.policy, self.draws)
        return x_0

    def _check_first_ratio(self, experience: Experience, x_0: Tensor) -> None:
        """Raise unless the replay repeats its rollout, so that the first ratio is 1; then make it exactly 1.

        The two passes see other batches, so their last bits may differ; the replay's prediction takes the place of the
        rollout's.
        """
        done, rows = experience.rollout, (experience.steps < self.policy.num_random_steps).nonzero()[:, 0]
        if len(rows):
            ratio = replay_log_ratio(done, x_0[rows], rows, experience.steps[rows], self.policy, "mean").abs().max()
            bound = FIRST_RATIO_TOLERANCE[self.settings.bf16]
            if not bool(ratio <= bound):
                raise RDMError(
                    f"the replay of a rollout does not repeat it: the first log-ratio per dimension is {ratio:.3g}, "
                    f"not 0 (bound {bound}). Something in the student is random, such as dropout"
                )
        done.x_0[experience.steps, torch.arange(len(x_0), device=x_0.device)] = x_0

    # ---- Keeping ------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Store this step's rollouts at its end, if they are to be used again."""
        if self.experiences and self.experiences[-1].use + 1 < self.settings.num_iterations:
            self.stored = self.experiences


def rollouts_path(checkpoint: str | Path, process_index: int) -> Path:
    """Return where a checkpoint keeps a process's rollouts."""
    return Path(checkpoint) / f"rdm_rollouts_{process_index}.safetensors"


def write_rollouts(path: Path, experiences: Sequence[Experience]) -> None:
    """Write experiences without what the next use brings back: encodings, columns and x_0.

    Nothing to write, no file.
    """
    if not experiences:
        return
    tensors: dict[str, Tensor] = {}
    for i, one in enumerate(experiences):
        tensors |= {f"{i}.{name}": getattr(one, name) for name in _FIELDS}
        tensors |= {f"{i}.rollout.{name}": getattr(one.rollout, name) for name in _TRAJECTORY}
        for name, output in one.scored.items():
            tensors[f"{i}.scored.{name}"] = output.scores
            tensors |= {f"{i}.logged.{figure}.{name}": values for figure, values in output.logged.items()}
    metadata = {
        "prompts": json.dumps([one.prompts for one in experiences]),
        "uses": json.dumps([one.use for one in experiences]),
        "starts": json.dumps([one.start for one in experiences]),
        "scored": json.dumps([{name: list(o.logged) for name, o in one.scored.items()} for one in experiences]),
    }
    with replacing(path) as staged:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, staged, metadata)


def read_rollouts(path: Path, device: torch.device) -> list[Experience]:
    """Return what `write_rollouts` wrote, none where there is no file; encodings and columns are empty."""
    if not path.is_file():
        return []
    with safe_open(path, framework="pt", device=device.type if device.type == "cpu" else str(device)) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    prompts, uses = json.loads(metadata["prompts"]), json.loads(metadata["uses"])
    experiences = []
    scores, starts = json.loads(metadata["scored"]), json.loads(metadata["starts"])
    for i, (texts, use, start, names) in enumerate(zip(prompts, uses, starts, scores, strict=True)):
        rollout = Rollout(**{name: tensors[f"{i}.rollout.{name}"] for name in _TRAJECTORY})
        prefix = f"{i}.scored."
        scored = {
            name: RewardOutput(tensors[prefix + name], logged={f: tensors[f"{i}.logged.{f}.{name}"] for f in figures})
            for name, figures in names.items()
        }
        plan, weights = tensors[f"{i}.plan"], tensors[f"{i}.weights"]
        x_0 = select_steps(rollout.x_0, plan[use, start : start + len(texts)])
        experiences.append(Experience(texts, {}, {}, rollout, plan, use, x_0, weights, scored, start))
    return experiences
