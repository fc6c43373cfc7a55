"""Roles on one base: the teacher stays what it is, gradients reach whom they should, the base is held once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError as ReplayError
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from rdm_sdk import ConfigError, RDMTrainer, digits
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import _RESTRICTED, check_lora_config

PROMPTS = ["a handwritten seven", "a handwritten two", "the digit four"]


def two_roles() -> ModelFamily:
    """Return the embedded teacher with roles "student" and "fake" whose adapters are not zero."""
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    family.add_roles({"student": LoraConfig(r=4), "fake": LoraConfig(r=4)})
    generator = torch.Generator().manual_seed(3)
    for role in ("student", "fake"):
        for parameter in family.roles.parameters_of(role).values():
            parameter.data.normal_(std=0.1, generator=generator)
    return family


def inputs_of(family: ModelFamily) -> tuple[Tensor, Tensor]:
    """Return fixed noisy latents and noise levels for PROMPTS."""
    generator = torch.Generator().manual_seed(4)
    shape = family.latent_shape(None, None)
    return torch.randn(len(PROMPTS), *shape, generator=generator), torch.tensor([0.9, 0.5, 0.3])


def output_of(family: ModelFamily, role: str) -> Tensor:
    """Return a role's x_0 for fixed inputs."""
    with torch.no_grad():
        return family.denoiser(family.roles, role, family.encode_prompts(PROMPTS))(*inputs_of(family))


def gradients(family: ModelFamily, between: Callable[[], object] | None = None) -> dict[str, Tensor]:
    """Return the student's gradients of a fixed loss, with something happening between forward and backward."""
    student = family.denoiser(family.roles, "student", family.encode_prompts(PROMPTS))
    loss = student(*inputs_of(family)).square().mean()
    if between is not None:
        between()
    loss.backward()
    return {n: p.grad for n, p in family.roles.parameters_of("student").items() if p.grad is not None}


def test_teacher_output_is_bit_equal_before_and_after_training(
    make_digits_trainer: Callable[..., RDMTrainer], tmp_path: Path
) -> None:
    """The leak check: with trained adapters present, the teacher role is still the untouched base."""
    fresh = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    before = output_of(fresh, "teacher")
    trainer = make_digits_trainer(tmp_path, learning_rate=1e-2, guidance_scale=1.5, max_steps=3)
    assert torch.equal(output_of(trainer.family, "student"), before)  # adapters start at the teacher
    trainer.train()
    assert torch.equal(output_of(trainer.family, "teacher"), before)
    assert not torch.allclose(output_of(trainer.family, "student"), before, atol=1e-3)
    assert not torch.allclose(output_of(trainer.family, "fake"), before, atol=1e-3)


class Snapshots(TrainerCallback):
    """Copies all parameters at a step's beginning, after the critic's updates and after the student's."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.taken: list[dict[str, Tensor]] = []

    def take(self, *_: Any, **__: Any) -> None:
        self.taken.append({name: p.detach().clone() for name, p in self.trainer.roles.named_parameters()})

    on_step_begin = on_pre_optimizer_step = on_optimizer_step = take


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_changes_only_its_own_role(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, accumulation: int
) -> None:
    """A critic update moves only the critic's weights, a student update only the student's (law 7)."""
    snapshots = Snapshots()
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation, weight_decay=0.1, callbacks=[snapshots])
    snapshots.trainer = trainer
    trainer.train()
    assert len(snapshots.taken) == 3 * trainer.args.max_steps

    def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        names = [name for name in before if not torch.equal(before[name], after[name])]
        return {role for name in names for role in ("base", "student", "fake") if f".{role}." in f"{name}."} | {
            "base" for name in names if "lora_" not in name and not name.startswith("step_embeddings.fake.")
        }

    for start, critic_done, student_done in zip(*[iter(snapshots.taken)] * 3, strict=True):
        assert changed(start, critic_done) == {"fake"}
        assert changed(critic_done, student_done) == {"student"}


@pytest.mark.parametrize("other", ["teacher", "fake"])
def test_student_gradient_survives_another_role_between_forward_and_backward(other: str) -> None:
    """Running another role before the backward pass neither loses nor changes the student's gradient."""
    family = two_roles()
    expected = {name: g.clone() for name, g in gradients(family).items()}
    assert len(expected) == len(family.roles.parameters_of("student"))
    family = two_roles()
    got = gradients(family, lambda: output_of(family, other))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert max(g.abs().max() for g in got.values()) > 1e-4


@pytest.mark.parametrize("other", ["teacher", "fake"])
def test_gradient_checkpointing_replays_under_the_role_of_the_forward(other: str) -> None:
    """Checkpointed gradients equal plain ones although another role ran in between."""
    expected = {name: g.clone() for name, g in gradients(two_roles()).items()}
    family = two_roles()
    family.roles.gradient_checkpointing_enable()
    got = gradients(family, lambda: output_of(family, other))
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)


def test_gradient_checkpointing_without_the_role_context_is_wrong() -> None:
    """The trap that the test above guards against is real: diffusers' plain switch replays as the teacher."""
    expected = {name: g.clone() for name, g in gradients(two_roles()).items()}
    family = two_roles()
    family.backbone.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    try:
        got = gradients(family, lambda: output_of(family, "fake"))
    except ReplayError:
        return
    worst = max((got.get(name, torch.zeros_like(g)) - g).abs().max().item() for name, g in expected.items())
    assert worst > 1e-4


def test_replay_leaves_the_active_role_as_it_was() -> None:
    """After a checkpointed backward pass the model is back in the role it had."""
    family = two_roles()
    family.roles.gradient_checkpointing_enable()
    gradients(family)
    layers = [m for m in family.backbone.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert all(layer.disable_adapters for layer in layers)


def test_the_base_is_held_once(make_digits_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """The trained module's storages add up to one base, two LoRA adapters and what tells the critic the step."""
    rank, base = 4, DiffusionPipeline.from_pretrained(digits.teacher_path()).transformer
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=["attn.to_q", "attn.add_k_proj"])
    trainer = make_digits_trainer(tmp_path, peft_config=lora)
    trainer.train()

    def storage_bytes(module: nn.Module) -> int:
        tensors = [*module.parameters(), *module.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    targets = [m for n, m in base.named_modules() if n.endswith(("attn.to_q", "attn.add_k_proj"))]
    one_adapter = sum(4 * rank * (m.in_features + m.out_features) for m in targets)
    assert targets
    told = sum(v.numel() * 4 for v in trainer.roles.embedding_parameters_of("fake").values())
    assert told == 4 * 4 * (64 + 64)  # float32, of four steps, for tokens and for pooled text
    assert storage_bytes(trainer.model) == storage_bytes(base) + 2 * one_adapter + told
    assert one_adapter < storage_bytes(base) / 10


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["proj_out"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", False),
        ("lora_dropout", 0.1),
        ("use_dora", True),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("megatron_config", {"a": 1}),
    ],
)
def test_lora_options_that_touch_the_base_are_refused(option: str, value: object) -> None:
    """Options that would change the teacher or make a forward random raise, naming option and value."""
    with pytest.raises(ConfigError, match=rf"fake_peft_config\.{option}=.*cannot be used.*Use "):
        check_lora_config(LoraConfig(**{option: value}), "fake_peft_config")


@pytest.mark.parametrize(
    "config", [LoHaConfig(), LoKrConfig(), AdaLoraConfig(total_step=10), {"r": 4}], ids=lambda c: type(c).__name__
)
def test_adapters_that_are_no_lora_are_refused(config: Any, tmp_path: Path, small_config: Any) -> None:
    """Before the base is loaded: they would train, and fail at the first save."""
    with pytest.raises(ConfigError, match=rf"peft_config must be a peft\.LoraConfig; got {type(config).__name__}"):
        RDMTrainer(str(tmp_path / "nowhere"), "dm", small_config(tmp_path), digits.prompts(), peft_config=config)


ALLOWED = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "qalora_group_size", "megatron_core"),  # without effect where nothing asks
}


def test_there_is_a_verdict_on_every_option_of_a_lora() -> None:
    """A version of PEFT with another option fails here, until someone has looked at it."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} - ALLOWED - _RESTRICTED.keys() == set()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 12},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"attn.to_q": 3}},
        {"exclude_modules": ["attn.to_q"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_harmless_lora_options_are_allowed(options: dict[str, Any]) -> None:
    """Rank, alpha, their patterns, exclusions and safe initializations work and start at the teacher."""
    config = LoraConfig(**options)
    check_lora_config(config)
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    before = output_of(family, "teacher")
    family.add_roles({"student": config})
    torch.testing.assert_close(output_of(family, "student"), before, rtol=0, atol=1e-5)


def test_unknown_target_modules_name_the_layers_there_are(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path
) -> None:
    """Targets that match nothing raise, and the message lists linear layers that exist."""
    with pytest.raises(ConfigError, match=r"Linear layers of this model: .*add_k_proj.*to_q"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize("name", ["attn", "to_q", "ema", "my.critic", ""])
def test_a_role_whose_weights_could_not_be_found_is_refused(name: str) -> None:
    """A name that the backbone has would take the base's own weights for the role's."""
    roles = two_roles().roles
    with pytest.raises(ConfigError, match=rf"a role cannot be called '{name}'.*Capabilities\.trains"):
        roles.add_role(name, LoraConfig(target_modules=["attn.to_q"]))
    assert roles.trainable_roles == ("student", "fake")


def test_a_role_is_added_once() -> None:
    """The same role twice, the teacher's name, or an unknown role raise."""
    family = two_roles()
    with pytest.raises(ConfigError, match="already a role 'student'"):
        family.roles.add_role("student", LoraConfig(r=4, target_modules=["attn.to_q"]))
    with pytest.raises(ConfigError, match="already a role 'teacher'"):
        family.roles.add_role("teacher", LoraConfig(r=4, target_modules=["attn.to_q"]))
    with pytest.raises(ConfigError, match="no role 'critic'; there are teacher, student, fake"):
        family.roles("critic", hidden_states=inputs_of(family)[0])


def test_a_base_with_roles_is_refused_by_a_second_trainer(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path
) -> None:
    """A pipeline or family that another trainer has put adapters on is not silently trained on."""
    with pytest.raises(ConfigError, match="already has trainable roles"):
        make_trainer(tmp_path, model=two_roles())


def test_roles_differ_and_add_no_state_to_each_other() -> None:
    """Each role's output is its own, whatever ran before it."""
    family = two_roles()
    alone = {role: output_of(family, role) for role in ("teacher", "student", "fake")}
    for role in ("fake", "teacher", "student", "teacher", "fake"):
        assert torch.equal(output_of(family, role), alone[role])
    assert not torch.allclose(alone["student"], alone["teacher"], atol=1e-3)
    assert not torch.allclose(alone["student"], alone["fake"], atol=1e-3)


def test_a_roles_parameters_are_the_models_own_in_its_order() -> None:
    """The optimizer and the moving average go by that order; a parameter that was replaced is the new one."""
    roles = two_roles().roles
    for role in ("student", "fake"):
        expected = [(n, p) for n, p in roles.backbone.named_parameters() if f".{role}." in n]
        assert len(expected) > 20
        got = list(roles.parameters_of(role).items())
        assert [name for name, _ in got] == [name for name, _ in expected]
        assert all(one is other for (_, one), (_, other) in zip(got, expected, strict=True))
    layer = next(module for module in roles.backbone.modules() if isinstance(module, BaseTunerLayer))
    layer.lora_A["student"].weight = nn.Parameter(torch.zeros_like(layer.lora_A["student"].weight))
    assert any(p is layer.lora_A["student"].weight for p in roles.parameters_of("student").values())


def test_what_is_trained_is_float32_whatever_it_comes_in() -> None:
    """In fewer bits, small updates would be lost; a later role leaves the earlier ones so."""
    family = load_family(digits.teacher_path(), torch.bfloat16, max_sequence_length=4)
    family.add_roles({"student": LoraConfig(r=4), "fake": LoraConfig(r=4)})
    family.roles.add_head("head", nn.Linear(2, 2, dtype=torch.bfloat16))
    parameters = [p for role in ("student", "fake", "head") for p in family.roles.parameters_of(role).values()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {p.dtype for n, p in family.backbone.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_a_role_that_is_taken_up_again_gives_back_the_one_in_use() -> None:
    """As when a graph is walked twice, from within two roles."""
    roles = two_roles().roles
    again = roles.use("fake")
    with again:
        pass
    with roles.use("student"):
        with again, roles.use("teacher"), again:
            assert roles._role == "fake"
        assert roles._role == "student"
    assert roles._role == "teacher"


def test_switching_never_touches_requires_grad() -> None:
    """Every role's parameters stay trainable, and the base stays frozen, through any switch."""
    family = two_roles()
    for role in ("student", "teacher", "fake"):
        output_of(family, role)
        for name, parameter in family.roles.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name


def test_pefts_private_flags_are_still_there() -> None:
    """A version guard: the attributes that switch roles exist and do what their public readers say."""
    family = two_roles()
    layers = [m for m in family.backbone.modules() if isinstance(m, BaseTunerLayer)]
    assert all("_disable_adapters" in vars(type(m)) or hasattr(m, "_disable_adapters") for m in layers)
    assert all(hasattr(m, "_active_adapter") for m in layers)
    with family.roles.use("fake"):
        assert all(m.active_adapters == ["fake"] and not m.disable_adapters for m in layers)
        with family.roles.use("student"):
            assert all(m.active_adapters == ["student"] and not m.disable_adapters for m in layers)
        assert all(m.active_adapters == ["fake"] for m in layers)
    assert all(m.disable_adapters for m in layers)
