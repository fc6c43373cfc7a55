"""What is evaluated: exported students, and their teacher at some numbers of steps. Nothing is loaded here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdm_sdk.errors import ConfigError
from rdm_sdk.evaluation.names import short_names
from rdm_sdk.evaluation.provenance import files_digest
from rdm_sdk.training.export import CALL, SCHEDULER, read_call
from rdm_sdk.training.student_base import WEIGHTS, read_json

_FILES = (WEIGHTS, "peft/*", "transformer/*", "unet/*", "scheduler/*", CALL)
"""What of a student's folder decides its images."""
TEACHER = "teacher"
"""What rows of the teacher are called."""


@dataclass(frozen=True)
class Candidate:
    """A sampler of images: the teacher, or a student, at a number of steps."""

    name: str
    steps: int
    student: Path | None
    """The folder that training saved; None for the teacher."""
    call: Mapping[str, Any]
    """The arguments of the pipeline call beside the prompt, the number of steps among them."""
    fingerprint: str
    """A hash of the student's files; empty for the teacher."""
    shift: float | None = None
    """The shift of a student's grid of noise levels; None for the base's."""
    regrid: bool = False
    """Whether the scheduler is made anew for `steps`, because it was saved for another number."""


def student_candidates(folder: str | Path, steps: Sequence[int], call: Mapping[str, Any]) -> list[Candidate]:
    """Return an exported student as a candidate for each number of steps; for its trained one where none is given.

    Args:
        folder: what training saved.
        steps: numbers of steps. A student that re-noises after each step has one that it can be sampled with.
        call: arguments that take the place of those in `inference.json`.

    Raises:
        ModelError: the folder holds no student.
        ConfigError: the student cannot be sampled with a number of steps.
    """
    path = Path(folder)
    trained = read_call(path)
    mine = int(trained["num_inference_steps"])
    wrong = [count for count in steps if count != mine]
    whole = (path / SCHEDULER).is_file()
    # Without a scheduler, other numbers of steps are refused first: leaving them out is the nearer advice.
    scheduler = {"stochastic_sampling": True} if wrong and not whole else read_json(path, SCHEDULER)
    renoises = bool(scheduler.get("stochastic_sampling")) or scheduler.get("_class_name") == "LCMScheduler"
    shift = scheduler.get("shift") if "FlowMatch" in str(scheduler.get("_class_name")) else None
    if renoises and wrong:
        raise ConfigError(
            f"the student in {path} was trained for {mine} steps, and its scheduler, which re-noises after each of its "
            f"{mine} steps, holds their noise levels alone; got {', '.join(map(str, wrong))}. Leave the steps out"
        )
    fingerprint = files_digest(path, _FILES)
    return [
        Candidate(
            f"{path.name}, {counted(count)}",
            count,
            path,
            trained | dict(call) | {"num_inference_steps": count},
            fingerprint,
            shift,
            count != mine,
        )
        for count in steps or [mine]
    ]


def teacher_candidate(steps: int, call: Mapping[str, Any]) -> Candidate:
    """Return the teacher at a number of steps; `call` are its arguments beside prompt, guidance and steps."""
    if steps < 1:
        raise ConfigError(f"the teacher cannot be sampled with {steps} steps; give 1 or more")
    rest = {name: value for name, value in call.items() if name not in ("num_inference_steps", "guidance_scale")}
    return Candidate(f"{TEACHER}, {counted(steps)}", steps, None, rest, "")


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with names that differ: students are called by as much of their paths as need be.

    Raises:
        ConfigError: one is given twice, in whatever spelling.
    """
    places = [None if one.student is None else one.student.resolve() for one in candidates]
    given = Counter(zip(places, (one.steps for one in candidates), strict=True))
    for place, one in zip(places, candidates, strict=True):
        if given[place, one.steps] > 1:
            name = one.name if place is None else f"{place}, {counted(one.steps)}"
            raise ConfigError(f"{name!r} is given twice; give each student and each number of steps once")
    students = {place: one.student for place, one in zip(places, candidates, strict=True) if one.student is not None}
    names = dict(zip(students, short_names(list(students.values()), taken=(TEACHER,)), strict=True))
    return [
        one if place is None else replace(one, name=f"{names[place]}, {counted(one.steps)}")
        for place, one in zip(places, candidates, strict=True)
    ]


def shared_call(candidates: Sequence[Candidate], call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size and text length that the teacher is sampled with: what is given, else the students'.

    Raises:
        ConfigError: the students disagree, so that their images cannot be compared.
    """
    result = dict(call)
    for name in ("height", "width", "max_sequence_length"):
        found = {candidate.name: candidate.call[name] for candidate in candidates if name in candidate.call}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{who}: {value}" for who, value in found.items())
            raise ConfigError(f"the students' {name} differ ({each}); give {name}, which then holds for all")
        if found:
            result.setdefault(name, next(iter(found.values())))
    return result


def counted(steps: int) -> str:
    """Return "1 step", "2 steps", ..."""
    return f"{steps} step{'' if steps == 1 else 's'}"
