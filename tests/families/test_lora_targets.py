"""Which layers get adapters: all that can learn, in every family, for every role, through the export and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import TINY_PIPELINES
from torch import nn
from true_shapes import write_configs
from usual_families import usual_families

from rdm_sdk import ConfigError, RDMTrainer, digits
from rdm_sdk.cli import main as cli
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT, TEACHER, Roles
from rdm_sdk.families.targets import linear_layers, names_of_adapted
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing.family_subject import CLOSE, ModelSubject, call, images_of, relative_difference
from rdm_sdk.training.export import PEFT_FOLDER, StudentInfo, load_student, save_student

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ALPHA = {"r": 4, "lora_alpha": 12}

LEFT_OUT: dict[str, set[str]] = {
    # The last block's text: asked for nothing (SD3), or computed and dropped (Qwen-Image).
    "StableDiffusion3Pipeline": {"transformer_blocks.2.attn.add_q_proj"},
    "QwenImagePipeline": {
        "transformer_blocks.1.attn.add_q_proj",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.txt_mlp.net.0.proj",
        "transformer_blocks.1.txt_mlp.net.2",
    },
    # Depthwise: their groups do not divide a rank.
    "SanaPipeline": {"transformer_blocks.0.ff.conv_depth", "transformer_blocks.1.ff.conv_depth"},
}
"""All layers of the tiny pipelines that are linear or convolutions and get no adapters."""


def adapted(network: nn.Module, role: str | None = None) -> set[str]:
    """Return the names of the layers that have adapters, of a role if one is named."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name for name, layer in layers.items() if role is None or role in layer.lora_A}


def moved(family: ModelFamily) -> ModelFamily:
    """Give every trained role's adapters weights that are not how they start, and return the model."""
    generator = torch.Generator().manual_seed(1)
    for role in family.roles.denoising_roles:
        for parameter in family.roles.parameters_of(role).values():
            parameter.data.normal_(std=0.1, generator=generator)
    return family


def digits_with(**roles: LoraConfig | None) -> ModelFamily:
    """Return the embedded teacher with roles."""
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=4)
    family.add_roles(roles)
    return family


# ---- Defaults ---------------------------------------------------------------------------------------------------


@usual_families
def test_every_layer_that_can_learn_has_an_adapter(kind: str) -> None:
    """All linear layers and convolutions but the few listed; each adapter gets a gradient, both its matrices."""
    subject = ModelSubject(TINY_PIPELINES[kind])
    family = subject.fresh()
    kinds = (nn.Linear, nn.Conv2d)
    everything = {name for name, layer in family.backbone.named_modules() if isinstance(layer, kinds)}
    assert LEFT_OUT.get(kind, set()) < everything
    family.add_roles({STUDENT: LoraConfig(**ALPHA)})
    assert adapted(family.backbone) == everything - LEFT_OUT.get(kind, set())
    student = moved(family).denoiser(family.roles, STUDENT, subject.condition)
    student(subject.x_t, subject.sigma).square().mean().backward()
    parameters = family.roles.parameters_of(STUDENT)
    assert len(parameters) == 2 * len(adapted(family.backbone))
    assert [name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()] == []


@usual_families
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_roles_have_the_same_layers(kind: str, targets: str | None) -> None:
    """Whatever was there before: no role wraps another's matrices, and nothing but the backbone is touched."""
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    before, linear = family.lora_targets, linear_layers(family.backbone)
    roles = [STUDENT, "fake", "another"]
    family.add_roles({role: LoraConfig(r=2, target_modules=targets) for role in roles})
    if targets == "all-linear":
        wanted = {name for name, layer in linear.items() if isinstance(layer, nn.Linear)}
    else:
        wanted = set(before)
    assert [adapted(family.backbone, role) for role in roles] == 3 * [wanted]
    assert adapted(family.backbone) == wanted
    assert not any(re.search(r"lora_.*lora_", name) for name, _ in family.backbone.named_modules())
    assert family.lora_targets == before
    assert all(linear_layers(family.backbone)[name] is layer for name, layer in linear.items())
    assert not any(adapted(part) for part in family.frozen_parts().values())


@pytest.mark.parametrize(("student", "critic"), [("lora", "full"), ("full", "lora")])
def test_a_copy_beside_adapters_has_none(student: str, critic: str) -> None:
    """And the adapters beside it are where they always are."""
    configs = {"lora": LoraConfig(r=2), "full": None}
    family = digits_with(student=configs[student], fake=configs[critic])
    (role,) = [role for role, kind in ((STUDENT, student), ("fake", critic)) if kind == "lora"]
    assert adapted(family.backbone, role) == set(family.lora_targets)
    assert len(family.lora_targets) > 40
    assert not any(adapted(copy) for copy in family.roles.copies.values())


# ---- The export -------------------------------------------------------------------------------------------------


@usual_families
def test_every_adapter_survives_the_export(kind: str, tmp_path: Path) -> None:
    """A plain pipeline and PEFT load each on its layer with its scale, and make the student's images."""
    subject = ModelSubject(TINY_PIPELINES[kind])
    family = subject.fresh()
    family.add_roles({STUDENT: LoraConfig(**ALPHA), "fake": LoraConfig(r=2)})
    ours, base = (images_of(moved(family), role, subject.x_t) for role in (STUDENT, TEACHER))
    save_student(tmp_path, family, StudentInfo(4, None, False, 1.0, resolve_rewards("dm"), {}))
    plain = subject.fresh().pipeline
    load_student(plain, tmp_path)
    by_peft = getattr(subject.fresh().pipeline, family.component)
    PeftModel.from_pretrained(by_peft, str(tmp_path / PEFT_FOLDER))
    own, loaded_by_diffusers = dict(family.backbone.named_modules()), hasattr(plain, "load_lora_weights")
    for network in (getattr(plain, family.component), by_peft):
        assert adapted(network) == set(family.lora_targets)
        for name in family.lora_targets:
            found, wanted = network.get_submodule(name), own[name]
            (label,) = found.lora_A
            assert torch.equal(found.lora_A[label].weight, wanted.lora_A[STUDENT].weight)
            assert torch.equal(found.scaling[label] * found.lora_B[label].weight, 3 * wanted.lora_B[STUDENT].weight)
            assert found.scaling[label] == (3 if network is by_peft or not loaded_by_diffusers else 1)
            assert wanted.scaling[STUDENT] == 3
    theirs = call(family, plain, subject.x_t)
    assert relative_difference(ours, theirs) < CLOSE < 0.1 * relative_difference(ours, base)


@pytest.mark.parametrize(
    "kind",
    ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline", pytest.param("FluxPipeline", marks=pytest.mark.slow)],
)
def test_true_shapes_are_described_in_few_words(kind: str, tmp_path: Path) -> None:
    """Hundreds of layers come down to some endings of names, which stand for the same layers again."""
    family = blueprint(write_configs(tmp_path / kind, kind), torch.bfloat16)
    with torch.device("meta"):
        family.add_roles({STUDENT: LoraConfig(r=16)})
    layers, config = adapted(family.backbone), family.roles.lora_config(STUDENT)
    assert layers == set(family.lora_targets)
    assert len(layers) > 300
    assert len(config.target_modules) < 60
    config.save_pretrained(str(tmp_path))
    again = blueprint(write_configs(tmp_path / kind, kind), torch.bfloat16)
    with torch.device("meta"):
        again.roles.add_role(STUDENT, LoraConfig.from_pretrained(str(tmp_path)))
    assert adapted(again.backbone) == layers


# ---- Configs of one's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", "ALL-linear", ["all-linear"], {"All-Linear"}])
def test_all_linear_is_every_linear_layer(targets: Any) -> None:
    """As a word, or as the list of one that a command line makes of it: no convolution, and no layer left out."""
    family = digits_with(student=LoraConfig(r=2, target_modules=targets), fake=LoraConfig(r=2))
    linear = {name for name, layer in linear_layers(family.backbone).items() if isinstance(layer, nn.Linear)}
    assert adapted(family.backbone, STUDENT) == linear
    assert adapted(family.backbone, "fake") - linear == {"pos_embed.proj"}


def matching(family: ModelFamily, pattern: str) -> set[str]:
    return {name for name in family.lora_targets if re.fullmatch(pattern, name)}


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"target_modules": ["attn.to_q", "norm_out.linear"]}, r".*attn\.to_q|norm_out\.linear"),
        ({"target_modules": r".*norm1\.linear"}, r".*\.norm1\.linear"),
        ({"exclude_modules": ["linear_1", "proj_out"]}, r"(?!.*linear_1$|proj_out$).*"),
        ({"exclude_modules": r".*attn\..*"}, r"(?!.*attn\.).*"),
        ({"target_modules": "all-linear", "exclude_modules": ["attn.to_q"]}, r"(?!.*attn\.to_q$|pos_embed).*"),
        ({"layers_to_transform": [1]}, r"transformer_blocks\.1\..*"),
        ({"layers_to_transform": 1, "layers_pattern": "transformer_blocks"}, r"transformer_blocks\.1\..*"),
        ({"layers_to_transform": [0], "layers_pattern": ["transformer_blocks"]}, r"transformer_blocks\.0\..*"),
    ],
)
def test_a_config_narrows_them(options: dict[str, Any], pattern: str) -> None:
    """Names, exclusions and indices say where adapters are, for both roles."""
    family = digits_with(student=LoraConfig(r=2, **options), fake=LoraConfig(r=2, **options))
    wanted = matching(family, pattern)
    if options.get("target_modules") == "all-linear":
        wanted |= set(family.lora_excluded)
    assert 0 < len(wanted) < len(family.lora_targets)
    for role in (STUDENT, "fake"):
        assert adapted(family.backbone, role) == wanted


def test_patterns_say_ranks_and_alphas() -> None:
    """Of single layers, wherever they are."""
    family = digits_with(student=LoraConfig(r=2, lora_alpha=4, rank_pattern={"norm_out.linear": 6, "attn.to_q": 3}))
    ranks = {name: family.backbone.get_submodule(name).r[STUDENT] for name in family.lora_targets}
    assert ranks["norm_out.linear"] == 6
    assert {rank for name, rank in ranks.items() if name.endswith("attn.to_q")} == {3}
    assert {rank for name, rank in ranks.items() if not name.endswith(("attn.to_q", "norm_out.linear"))} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["attn.to_q", "to_w"]}, "target_modules .* 'to_w', .* did you mean .*'to_v'"),
        ({"target_modules": ["attn.to_q", "o_q"]}, "target_modules .* 'o_q'"),  # an ending, but no name
        ({"target_modules": ["attn.to_q", "no such thing at all"]}, r"ends so\. Linear layers of this model: .*to_q"),
        ({"rank_pattern": {"attn.to_w": 3}}, "rank_pattern .* 'attn.to_w'"),
        ({"alpha_pattern": {"norm_out.linear": 3, r".*to_w": 3}}, r"alpha_pattern .* '\.\*to_w'"),
    ],
)
def test_names_that_fit_no_layer_are_refused(options: dict[str, Any], message: str) -> None:
    """Though PEFT finds others: who mistypes one of four would train three."""
    with pytest.raises(ConfigError, match=message):
        digits_with(student=LoraConfig(r=2, **options))


def test_targets_that_leave_nothing_are_refused() -> None:
    """As those that match nothing are."""
    with pytest.raises(ConfigError, match="cannot add LoRA adapters"):
        digits_with(student=LoraConfig(r=2, layers_to_transform=[77]))


@pytest.mark.parametrize("given", ["flag", "word", "list", "nothing"])
def test_the_command_line_names_them(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`all-linear` as a flag, and in YAML as a word or as a list of one."""
    settings: dict[str, Any] = {"model": "digits", "output_dir": str(tmp_path / "run"), "use_cpu": True}
    settings |= {"max_sequence_length": 4, "guidance_scale": 1.0, "report_to": "none"}
    settings |= {"word": {"lora_target_modules": "all-linear"}, "list": {"lora_target_modules": ["all-linear"]}}.get(
        given, {}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    seen: list[ModelFamily] = []
    monkeypatch.setattr(RDMTrainer, "train", lambda trainer, **_: seen.append(trainer.family))
    monkeypatch.setattr(RDMTrainer, "save_model", lambda *_: None)
    flags = ["--lora_target_modules", "all-linear"] if given == "flag" else []
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), *flags]) == 0
    (family,) = seen
    for role in (STUDENT, "fake"):
        convolutions = adapted(family.backbone, role) & {"pos_embed.proj"}
        assert bool(convolutions) == (given == "nothing")
        assert len(adapted(family.backbone, role)) > 40


@pytest.mark.parametrize(
    ("pattern", "names"),
    [(r"block\.(to_q|out)", ["block.out", "block.to_q"]), (r"to_k|.*to_q", ["block.to_q", "to_k"]), ("out", None)],
)
def test_names_say_which_layers_a_pattern_is_for(pattern: str, names: list[str] | None) -> None:
    """A list of them gives the same adapters; none does where they would be endings of others, as "out" is here."""

    def network(**targets: Any) -> nn.Module:
        block = nn.ModuleDict({"to_q": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
        made = nn.ModuleDict({"block": block, "out": nn.Linear(2, 2), "to_k": nn.Linear(2, 2)})
        roles = Roles(made)
        for role, named in targets.items():
            roles.add_role(role, LoraConfig(r=1, target_modules=named))
        return made

    assert names_of_adapted(network(other=["out", "to_k", "to_q"], student=pattern), "student") == names
    assert names is None or adapted(network(student=names)) == set(names)
