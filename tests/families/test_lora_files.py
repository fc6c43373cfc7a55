"""A LoRA file means the same to a program that reads its metadata and to one that reads the bare weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk import ModelError
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import StudentInfo, load_student, save_kohya_lora, save_student
from rdm_sdk.training.student_base import WEIGHTS

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
tiny_sd3 = TINY_PIPELINES["StableDiffusion3Pipeline"]
CONFIGS: dict[str, dict[str, Any]] = {
    "twice the rank": {"r": 4, "lora_alpha": 8},
    "no power of two": {"r": 3, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "ranks of layers": {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn.to_q": 2}},
    "alphas of layers": {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks.1.attn.to_[qk]": 3}},
    "both": {"r": 4, "rank_pattern": {"to_q": 2, "to_k": 3}, "alpha_pattern": {"attn.to_q": 5, "to_v": 1}},
}


def export(settings: dict[str, Any], folder: Path, make: Any = tiny_sd3) -> ModelFamily:
    """Save a student with random adapters."""
    family = load_family(make(), torch.float32)
    family.add_roles({STUDENT: LoraConfig(**settings)})
    for parameter in family.roles.parameters_of(STUDENT).values():
        parameter.data.normal_(std=0.1)
    save_student(folder, family, StudentInfo(4, None, False, 1.0, resolve_rewards("dm"), {}))
    return family


def changes_of(network: Any) -> dict[str, Tensor]:
    """Return what the one adapter of a network adds to each weight, as PEFT computes it."""
    return {
        name.removesuffix(".base_layer"): module.get_delta_weight(next(iter(module.lora_A)))
        for name, module in network.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_same_changes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, change in ours.items():
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(theirs[name], change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=list(CONFIGS))
def test_bare_weights_are_the_student(tmp_path: Path, settings: dict[str, Any]) -> None:
    """B A of the file is what the adapter adds; diffusers agrees, with the metadata and without."""
    wanted = changes_of(export(settings, tmp_path).backbone)
    bare = load_file(tmp_path / WEIGHTS)
    products = {}
    for name, tensor in bare.items():
        layer, found, _ = name.removeprefix("transformer.").partition(".lora_B.")
        if found:
            other = bare[name.replace("lora_B", "lora_A")]
            products[layer] = (tensor.flatten(1) @ other.flatten(1)).view(wanted[layer].shape)
    assert_same_changes(wanted, products)

    plain = tiny_sd3()
    load_student(plain, tmp_path)
    assert_same_changes(wanted, changes_of(plain.transformer))
    save_file(bare, tmp_path / WEIGHTS, metadata={"format": "pt"})
    plain = tiny_sd3()
    plain.load_lora_weights(str(tmp_path))
    assert_same_changes(wanted, changes_of(plain.transformer))


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=list(CONFIGS))
def test_pefts_folder_keeps_the_config(tmp_path: Path, settings: dict[str, Any]) -> None:
    """There, weights never go without it."""
    export(settings, tmp_path)
    kept = LoraConfig.from_pretrained(tmp_path / "peft")
    assert {name: getattr(kept, name) for name in settings} == settings


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_kohyas_names_are_what_diffusers_makes_and_reads(tmp_path: Path, kind: str) -> None:
    """Of every layer of a UNet: the names are its own converter's, and it reads the same changes from them.

    One rank for all: diffusers 0.42 forgets the alphas of layers of another rank when it reads these names.
    """
    make = TINY_PIPELINES[kind]
    family = export({"r": 4, "lora_alpha": 12}, tmp_path / "student", make)
    wanted = changes_of(family.backbone)
    assert wanted.keys() == set(family.lora_targets)
    file = save_kohya_lora(tmp_path / "student", tmp_path / "kohya.safetensors")
    assert file.stat().st_mode == (tmp_path / "student" / "base.json").stat().st_mode  # for whom other files are, too
    ours, theirs = load_file(file), convert_state_dict_to_kohya(load_file(tmp_path / "student" / WEIGHTS))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours if not name.endswith(".alpha"))
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".alpha"))
    plain = make()
    plain.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    # Diffusers 0.42 takes add_embedding for another name; ComfyUI's table has it (label_emb.0).
    assert_same_changes({n: t for n, t in wanted.items() if "add_embedding" not in n}, changes_of(plain.unet))


def test_every_layer_has_its_alpha(tmp_path: Path) -> None:
    """The rank, whatever it is, because the scale is in the weights."""
    make = TINY_PIPELINES["StableDiffusionPipeline"]
    family = export({"r": 4, "rank_pattern": {"to_q": 2}}, tmp_path / "student", make)
    state = load_file(save_kohya_lora(tmp_path / "student", tmp_path / "kohya.safetensors"))
    alphas = {name.removesuffix(".alpha"): float(alpha) for name, alpha in state.items() if name.endswith(".alpha")}
    assert alphas.keys() == {f"lora_unet_{name.replace('.', '_')}" for name in family.lora_targets}
    assert alphas == {name: float(state[f"{name}.lora_up.weight"].shape[1]) for name in alphas}
    assert set(alphas.values()) == {2.0, 4.0}


def test_kohyas_names_are_of_unets(tmp_path: Path) -> None:
    """A transformer has none."""
    export({"r": 2}, tmp_path)
    with pytest.raises(ModelError, match=r"kohya's names are those of a UNet's LoRA, and .* holds none"):
        save_kohya_lora(tmp_path, tmp_path / "kohya.safetensors")
    with pytest.raises(ModelError, match="holds none"):
        save_kohya_lora(tmp_path / "nowhere", tmp_path / "kohya.safetensors")
