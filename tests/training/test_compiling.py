"""`torch_compile`: every role computes what it computes without, and files, resuming and counts stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_runs import same_bits, weights_of_roles
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError, RDMTrainer
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.compiled import VARIANTS, compile_networks
from rdm_sdk.families.features import block_output
from rdm_sdk.families.load import load_family

Make = Callable[..., RDMTrainer]
LORA = LoraConfig(r=2, target_modules=["attn.to_q"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    """Compile anew, and leave PyTorch's limits as they were."""
    before = torch._dynamo.config.cache_size_limit, torch._functorch.config.donated_buffer
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit, torch._functorch.config.donated_buffer = before


class TwoLayers(torch.nn.Module):
    """A network that is ours: PyTorch does not compile its own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(inputs))


def graphs() -> int:
    """Return how many graphs were compiled; none may be broken into several."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch itself looks at it
def test_a_compiled_run_is_the_same_run(make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA student and critic, guided: outputs, gradients and updates to the last bits, the same names in the files."""
    trainers = []
    for folder, settings in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        given = {"guidance_scale": 1.5, "critic_steps": 1, "peft_config": LORA, "learning_rate": 1e-3, **settings}
        trainer = make_trainer(tmp_path / folder, max_steps=1, activation_checkpointing=True, **given)
        trainer.train()
        trainer.save_model(str(tmp_path / folder / "student"))
        trainers.append(trainer)
    plain, compiled = trainers
    # The student rolls out and learns, the teacher judges, the critic learns and judges, in one piece each; and the
    # trial before the base is loaded.
    assert graphs() == 5 + 1
    assert compiled.costs() == plain.costs()
    assert compiled.model_wrapped is compiled.roles
    for ours, theirs in zip(
        weights_of_roles(compiled, "student", "fake"), weights_of_roles(plain, "student", "fake"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for role in ("student", "fake"):
        assert compiled.roles.role_state_dict(role).keys() == plain.roles.role_state_dict(role).keys()
    name = "pytorch_lora_weights.safetensors"
    files = [load_file(tmp_path / folder / "student" / name) for folder in ("plain", "compiled")]
    assert files[0].keys() == files[1].keys()
    told = capsys.readouterr().out
    assert told.count("torch_compile: compiling with 'eager' took") == 1


def two_roles(kind: str, copies: bool = False) -> ModelFamily:
    """Return a tiny family whose student and critic are not zero: adapters, or full copies."""
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family.add_roles(dict.fromkeys(("student", "fake"), None if copies else LoraConfig(r=2)))
        for role in ("student", "fake"):
            for parameter in family.roles.parameters_of(role).values():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return family


def answers(family: ModelFamily) -> dict[str, torch.Tensor]:
    """Return what every role predicts, and the trained ones' gradients, with another role between."""
    generator = torch.Generator().manual_seed(1)
    x_t, sigma = torch.randn(2, *family.latent_shape(32, 32), generator=generator), torch.tensor([0.7, 0.3])
    condition, found = family.condition(["a fox", "a dog"], 3.0), {}
    for role in ("student", "fake"):
        predicted = family.denoiser(family.roles, role, condition)(x_t, sigma)
        with torch.no_grad():
            found["teacher"] = family.denoiser(family.roles, "teacher", condition)(x_t, sigma)
        predicted.square().mean().backward()
        found[role] = predicted.detach()
        for name, parameter in family.roles.parameters_of(role).items():
            if parameter.grad is not None:
                found[f"{role} {name}"] = parameter.grad.clone()
        family.roles.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True], ids=["lora", "copies"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_role_of_every_family_is_what_it_is_without(kind: str, checkpointing: bool, copies: bool) -> None:
    """Transformers and UNets, adapters and copies, blocks that are run again: a graph for each role.

    Two full copies are one graph, whose weights are inputs.
    """
    family = two_roles(kind, copies)
    if checkpointing and family.roles.no_checkpointing:
        pytest.skip(f"its blocks must not be run again: {family.roles.no_checkpointing}")
    plain = answers(family)
    if checkpointing:
        family.roles.gradient_checkpointing_enable()
    compile_networks([family.backbone, *family.roles.copies.values()], "eager", None)
    compiled = answers(family)
    assert graphs() == (2 if copies else 3)
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_too_and_a_resumed_run_is_the_uninterrupted_one(make_trainer: Make, tmp_path: Path) -> None:
    """With a tilt, which walks through the teacher's graph again, and a shape that the resumed run never saw."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-3}
    settings |= {"peft_config": LORA, "reward_route": "tilt", "torch_compile": True}
    whole = make_trainer(tmp_path / "whole", "dm + 0.5*legibility", **settings)
    whole.sample(["a three"], seed=0)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", "dm + 0.5*legibility", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same_bits(weights_of_roles(resumed, "student", "fake"), weights_of_roles(whole, "student", "fake"))
    plain = make_trainer(tmp_path / "plain", "dm + 0.5*legibility", **settings | {"torch_compile": False})
    plain.train()
    for ours, theirs in zip(weights_of_roles(whole, "student"), weights_of_roles(plain, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_hook_on_a_block_of_a_compiled_network_runs() -> None:
    """Heads read the middle block's output by a hook, which a graph that was compiled without it would not call."""
    network = TwoLayers()
    compile_networks([network], "eager", None)
    inputs = torch.randn(2, 3, 4)
    network(inputs)
    assert graphs() == 1
    torch.testing.assert_close(block_output(network, network.inner, network, inputs), network.inner(inputs))


def test_more_shapes_than_pytorchs_limit_stay_compiled() -> None:
    """Resolutions, rollouts of several depths and samples for an evaluation are shapes of their own."""
    network = TwoLayers()
    compile_networks([network], "eager", None)
    assert VARIANTS > 10
    for count in range(1, 11):
        network(torch.randn(count, 4))
    assert graphs() == 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"torch_compile_backend": "inducter"}, "PyTorch has no such backend. Did you mean 'inductor'"),
        ({"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}, "is one of the backend 'inductor'"),
        ({"torch_compile_mode": "fastest"}, "torch_compile_mode='fastest' cannot be used"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_what_cannot_be_compiled_is_refused(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("rdm_sdk.training.validation.load_family", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, **settings)


@pytest.mark.usefixtures("no_training")
def test_a_missing_compiler_is_found_before_the_base_is_loaded(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("torch._dynamo.backends.debugging.eager", fails)
    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: fails)
    monkeypatch.setattr("rdm_sdk.training.validation.load_family", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(ConfigError, match=r"the backend 'eager' does not work here: .*no working C"):
        make_trainer(tmp_path, torch_compile_backend="eager")
