"""What a model family has to do with a student and critics on it, one check each; `family_kit.py` runs them.

A check takes a `ModelSubject`; see `kit.Check`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rdm_sdk.errors import ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing.family_subject import (
    CLOSE,
    LORA,
    NUM_STEPS,
    ModelSubject,
    call,
    images_of,
    relative_difference,
)
from rdm_sdk.testing.kit import Check, Remark, collector, require
from rdm_sdk.training.export import StudentInfo, load_student, save_student

TRAINING_CHECKS: list[Check] = []
check = collector(TRAINING_CHECKS)


@check("denoises", "declarations")
def roles_share_the_base(subject: ModelSubject) -> None:
    """Adapters start as the teacher, and moving them leaves it bit for bit."""
    before = subject.denoise(subject.teacher())
    family = subject.fresh()
    family.add_roles({STUDENT: LORA, "fake": LORA})

    def x_0_of(role: str) -> Tensor:
        return subject.denoise(family.denoiser(family.roles, role, subject.condition))

    require(torch.equal(x_0_of(TEACHER), before), "adding adapters changed the teacher")
    require(relative_difference(x_0_of(STUDENT), before) < CLOSE, "the student does not start as the teacher")
    family = subject.trained
    require(torch.equal(x_0_of(TEACHER), before), "the adapters' weights reach the teacher; all layers must be PEFT's")
    require(not torch.equal(x_0_of(STUDENT), before), "the student's weights do not reach its output")


def gradients(family: ModelFamily, subject: ModelSubject, order: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients of two roles whose forwards ran in an order, with a teacher's in between."""
    losses = []
    for role in order:
        x_0 = family.denoiser(family.roles, role, subject.condition)(subject.x_t, subject.sigma)
        if role != TEACHER:
            losses.append(x_0.square().mean())
    torch.stack(losses).sum().backward()  # after all forwards, when another role is the last that was active
    found = {}
    for role in (STUDENT, "fake"):
        for name, parameter in family.roles.parameters_of(role).items():
            if parameter.grad is not None:
                found[f"{role}.{name}"], parameter.grad = parameter.grad, None
    return found


@check("roles_share_the_base")
def student_learns(subject: ModelSubject) -> None:
    """A gradient reaches the adapters of every kind of target."""
    family = subject.trained
    found = gradients(family, subject, (STUDENT, TEACHER))
    require(found, "no gradient reaches the student")
    for target in family.lora_targets:
        require(
            any(f".{target}." in name and bool(gradient.any()) for name, gradient in found.items()),
            f"no gradient reaches the adapters on {target!r}: the backbone does not use these layers, or does so "
            "without calling them; name them in lora_excluded",
        )


def inputs_of_adapters(family: ModelFamily, subject: ModelSubject, x_t: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Return what the student's adapted layers are fed first, by their names."""
    modules: dict[str, nn.Module] = dict(family.backbone.named_modules())
    names = {modules[name]: name for name in modules if isinstance(modules[name], BaseTunerLayer)}
    fed: dict[str, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fed.setdefault(names[layer], inputs[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in names]
    try:
        with torch.no_grad():
            family.denoiser(family.roles, STUDENT, subject.condition)(x_t, sigma)
    finally:
        for hook in hooks:
            hook.remove()
    return fed


@check("roles_share_the_base")
def targets_know_the_level(subject: ModelSubject) -> None:
    """Adapters reach what tells the network its noise level: layers that are fed an embedding of it."""
    family = subject.trained
    fed = inputs_of_adapters(family, subject, subject.x_t, subject.sigma)
    other_state = inputs_of_adapters(family, subject, subject.x_t.flip(-1), subject.sigma)
    other_level = inputs_of_adapters(family, subject, subject.x_t, subject.sigma / 2)
    # One vector per sample, the same for any state and another for another level. (Tokens of the text may know the
    # level too, in layers that are not there to tell it.)
    told = [
        name
        for name, vector in fed.items()
        if vector.numel() == len(subject.x_t) * vector.shape[-1]
        and torch.equal(vector, other_state[name])
        and not torch.equal(vector, other_level[name])
    ]
    require(
        told,
        "none of the lora_targets is fed an embedding of the noise level, so adapters cannot change what a level means "
        "to the network, and few-step students stall; add time embedders and modulation, or leave lora_targets as "
        "ModelFamily has them",
    )


@check("student_learns")
def checkpointing_changes_nothing(subject: ModelSubject) -> Remark | None:
    """Gradient checkpointing gives the same gradients, in whatever order the roles ran."""
    plain, saving = subject.trained, subject.freshly_trained()
    try:
        saving.roles.gradient_checkpointing_enable()
    except ModelError as error:
        return Remark("skipped", str(error))
    for order in ((STUDENT, TEACHER, "fake"), ("fake", STUDENT, TEACHER), (TEACHER, "fake", STUDENT)):
        wanted, found = gradients(plain, subject, order), gradients(saving, subject, order)
        require(wanted.keys() == found.keys(), f"other parameters have gradients when the roles run as {order}")
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        worst = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
        require(
            worst <= 1e-5 * largest,
            f"gradients differ by {worst:.3g} of {largest:.3g} when the roles run as {order}; the backbone must run "
            "its blocks through its own _gradient_checkpointing_func",
        )
    return None


@check("roles_share_the_base", "agrees_with_the_pipeline")
def exports(subject: ModelSubject) -> None:
    """A student that is saved and loaded into a plain pipeline of its base makes the same images."""
    family = subject.trained
    ours, base = images_of(family, STUDENT, subject.x_t), images_of(family, TEACHER, subject.x_t)
    require(relative_difference(ours, base) > 10 * CLOSE, "the student's images are the teacher's")
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder, family, StudentInfo(NUM_STEPS, None, False, 1.0, resolve_rewards("dm"), {}))
        plain = subject.fresh().pipeline
        scheduler = type(family.student_scheduler(NUM_STEPS, None, stochastic=False))
        plain.scheduler = scheduler.from_pretrained(Path(folder) / "scheduler")
        load_student(plain, folder)
        theirs = call(family, plain, subject.x_t)
    require(
        relative_difference(ours, theirs) < CLOSE,
        f"after save_lora() and load_student() the images differ by up to {float((ours - theirs).abs().max()):.3g}; is "
        "the LoRA metadata (alpha) written?",
    )
