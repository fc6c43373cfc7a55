"""A base that is shared out: what may be asked for, and that it is the same base; a group of one process shares it."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from digit_runs import same_bits
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import set_seed

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer, digits, plan_memory
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.sharding import shard_base
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training import validation
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.training.student_base import describe_base

# ---- Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"fsdp": True},
        {"fsdp": "full_shard"},
        {"fsdp": "true"},
        {"fsdp": ["full_shard"], "fsdp_config": {"fsdp_version": 2}},
        {"fsdp": True, "fsdp_config": '{"version": 2, "reshard_after_forward": "true"}'},
    ],
)
def test_the_base_can_be_shared_out(tmp_path: Path, given: dict[str, Any]) -> None:
    """However transformers lets it be said; accelerate is told nothing, and a copy of the config says the same."""
    config = RDMConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    again = dataclasses.replace(config, learning_rate=1e-3)
    for one in (config, again):
        assert (one.fsdp, one.fsdp_config, one.fsdp_plugin_args) == (True, {"version": 2}, None)
    for nothing in (None, False, "", [], "false"):
        assert not RDMConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=nothing, fsdp_config={}).fsdp


def test_settings_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "fsdp.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ConfigError, match="Leave out version"):
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=str(tmp_path / "fsdp.json"))
    with pytest.raises(ConfigError, match="neither JSON nor a file"):
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fsdp": "full_shard auto_wrap"}, "fsdp='full_shard auto_wrap' is not supported"),
        ({"fsdp": "shard_grad_op"}, "fsdp='shard_grad_op' is not supported"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "Leave out version"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "Leave out cpu_offload"),
        ({"fsdp": True, "fsdp_config": 2}, "must be a mapping"),
        ({"fsdp_config": {"version": 2}}, "does nothing without fsdp=True"),
        ({"fsdp": True, "student_weights": "full"}, "fsdp=True and student_weights='full'"),
        ({"fsdp": True, "critic_weights": "full"}, "fsdp=True and critic_weights='full'"),
        ({"fsdp": True, "quantization": "4bit"}, "fsdp=True and quantization='4bit'"),
        ({"fsdp": True, "torch_compile": True}, "fsdp=True and torch_compile=True"),
        ({"fsdp": True, "torch_compile_backend": "eager"}, "fsdp=True and torch_compile_backend='eager'"),
        ({"fsdp": True, "torch_compile_mode": "default"}, "fsdp=True and torch_compile_mode='default'"),
        ({"fsdp": True, "critic_rollouts": "fresh"}, "fsdp=True and critic_rollouts='fresh'.* use 'shared'"),
        ({"fsdp": True, "num_iterations": 2}, "importance_sampling_correction=True .* use num_iterations=1, or"),
    ],
)
def test_what_is_not_done_is_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert "\n" not in str(caught.value)


def test_one_process_has_nobody_to_share_with(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fsdp shares the base out between processes, and there is one"):
        make_trainer(tmp_path, fsdp=True)


def test_a_plan_is_of_a_whole_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave fsdp out"):
        plan_memory("nowhere", RDMConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True))


# ---- Devices that are refused -----------------------------------------------------------------------------------


def test_accelerates_own_ways_are_refused(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several GPUs in one process would be `nn.DataParallel`; launchers and their config files can ask for others."""
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="told to use DeepSpeed or FSDP, by its launcher's options"):
        validation.check_hosted(trainer.args, trainer.roles, shards=True)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(
        ConfigError, match=r"2 GPUs in one process would use nn.DataParallel.*torchrun, or set CUDA_VIS"
    ):
        validation.check_hosted(trainer.args, trainer.roles, shards=False)
    with pytest.raises(ConfigError, match=r"deepspeed={'zero_optimization': .* is not supported: start plain proc"):
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 2}})


# ---- The base ---------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SETTINGS: dict[str, Any] = {"num_generations": 2, "max_sequence_length": 4, "guidance_scale": 2.0, "critic_steps": 1}


def family_of(settings: RDMConfig) -> ModelFamily:
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    set_seed(0)
    lora = LoraConfig(r=4, lora_alpha=4)
    family.add_roles({"student": lora, "fake": lora}, {}, settings.steps_told)
    return family


def gradients(family: ModelFamily, settings: RDMConfig) -> dict[str, Tensor]:
    """Return the gradients of student and critic in one step of the method, with a tilt through the teacher."""
    models = RunModels(family, settings, torch.device("cpu"))
    rewards = resolve_rewards("dm + 0.3*legibility", None, "tilt")
    step = DistillationStep(Judge(models, rewards, settings), settings)
    torch.manual_seed(3)
    step.begin([{"prompts": [p for p in digits.prompts()[:2] for _ in range(2)], "columns": {}}], 0)
    for loss in step.critic_losses(0):
        loss.backward()
    step.end_critics()
    step.student_loss(0).loss.backward()
    step.end(1)
    named = {
        f"{role}.{name}": p for role in ("student", "fake") for name, p in family.roles.parameters_of(role).items()
    }
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_same(checkpointing: bool) -> None:
    """Every role's, with several forwards before a backward pass, with and without graphs; adapters stay whole."""
    settings = RDMConfig(**SETTINGS, use_cpu=True)
    whole, shared = family_of(settings), family_of(settings)
    shard_base(shared, torch.device("cpu"))
    found = []
    for family in (whole, shared):
        if checkpointing:
            family.roles.gradient_checkpointing_enable()
        found.append(gradients(family, settings))
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("student") for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    parameters = dict(shared.backbone.named_parameters())
    assert {name for name, p in parameters.items() if not isinstance(p, DTensor)} == {
        name for name in parameters if "lora_" in name
    }


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
def test_every_familys_passes_are_the_same(kind: str, checkpointing: bool) -> None:
    """Of teacher, student and critic, features included, with their graphs alive together; blocks are whole in turn."""
    found, resident = [], []
    for shares in (False, True):
        family = load_family(TINY_PIPELINES[kind](), torch.float32)
        set_seed(0)
        family.add_roles({role: LoraConfig(r=2, init_lora_weights=False) for role in ("student", "fake")})
        if shares:
            shard_base(family, torch.device("cpu"))
            family.feature_block().register_forward_hook(lambda *_, f=family: resident.append(whole_parameters(f)))
        family.to(torch.device("cpu"))
        if checkpointing and not family.no_checkpointing:
            family.roles.gradient_checkpointing_enable()
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(2, *family.latent_shape(32, 32), generator=generator).requires_grad_()
        sigma, condition = torch.tensor([0.3, 0.7]), family.condition(["a seven", "an eight"], 3.0)
        with torch.no_grad():
            predicted = [family.denoiser(family.roles, "teacher", condition)(x_t, sigma)]
        predicted += [family.denoiser(family.roles, role, condition)(x_t, sigma) for role in ("student", "fake")]
        predicted += [family.features(family.roles, "teacher", condition)(x_t, sigma)]
        predicted += torch.autograd.grad(predicted[3].square().sum(), x_t)
        for prediction in predicted[2:0:-1]:
            prediction.square().mean().backward()
        trained = [p for role in ("student", "fake") for p in family.roles.parameters_of(role).values()]
        found.append([*predicted, *(p.grad for p in trained if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for shared, whole in zip(found[1], found[0], strict=True):
        # A sum in another order is off by a share of its largest terms, which are up to 30 here (in float64: by 1e-15).
        largest = max(1.0, whole.abs().max().item())
        torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-6 * largest)
    everything = sum(1 for name, _ in family.backbone.named_parameters() if "lora_" not in name)
    assert 0 < max(resident) < everything


def whole_parameters(family: ModelFamily) -> int:
    """Return how many of a base's weights are put together at the moment."""
    parameters = family.backbone.named_parameters()
    return sum(1 for name, one in parameters if "lora_" not in name and not isinstance(one, DTensor))


@pytest.mark.usefixtures("group")
def test_it_is_known_again_and_saved_by_one_process() -> None:
    """Its fingerprint and description, whose values no process has any more; and adapters are saved and loaded."""
    settings = RDMConfig(**SETTINGS, use_cpu=True)
    whole, shared = family_of(settings), family_of(settings)
    shard_base(shared, torch.device("cpu"))
    assert shared.roles.sharded
    assert not whole.roles.sharded
    assert shared.fingerprint() == whole.fingerprint()
    about = [describe_base(one.pipeline, one.component, "lora") for one in (whole, shared)]
    assert about[0] == about[1]
    state = {name: tensor.clone() for name, tensor in shared.roles.role_state_dict("student").items()}
    assert same_bits([*state.values()], [*whole.roles.role_state_dict("student").values()])
    shared.roles.load_role_state_dict("student", {name: tensor + 1 for name, tensor in state.items()})
    name = next(iter(state))
    assert torch.equal(shared.roles.role_state_dict("student")[name], state[name] + 1)
    assert shared.dtype == torch.float32


@pytest.mark.usefixtures("group")
def test_nobody_keeps_a_whole_weight() -> None:
    """Whatever held one of the base's weights before it was shared out would hold all of it for the whole run."""
    family = family_of(RDMConfig(**SETTINGS, use_cpu=True))
    weights = [weakref.ref(p) for name, p in family.backbone.named_parameters() if "lora_" not in name]
    shard_base(family, torch.device("cpu"))
    gc.collect()
    assert weights
    assert [one for one in (ref() for ref in weights) if one is not None and one.untyped_storage().nbytes()] == []


@pytest.mark.usefixtures("group")
def test_a_base_that_cannot_be_shared_out() -> None:
    family = family_of(RDMConfig(**SETTINGS, use_cpu=True))
    family.backbone.hf_device_map = {"": "cpu"}
    with pytest.raises(ConfigError, match=r"a base that is whole, and of .* it is spread over devices"):
        shard_base(family, torch.device("cpu"))
    del family.backbone.hf_device_map
    family.backbone._no_split_modules = None
    with pytest.raises(ModelError, match="fsdp: SD3Transformer2DModel names no blocks"):
        shard_base(family, torch.device("cpu"))
