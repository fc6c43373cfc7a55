"""What a plan counts without making it: rewards, parts of a pipeline, quantized bytes, optimizers, true shapes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_runs import SMALL, plan_of, settings
from torch import nn
from transformers import (
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers import Qwen2_5_VLConfig as VlmConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Vlm
from true_shapes import write_configs

from rdm_sdk import ModelError, RDMConfig, RewardError, plan_memory
from rdm_sdk.digits.classifier import DigitClassifier
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import bytes_of, count_of
from rdm_sdk.planning.plan import GB, MemoryPlan, PlannedRun, Row, optimizer_bytes, quantized_bytes
from rdm_sdk.plugins.registry import registry
from rdm_sdk.rewards.resolve import PlannedReward, plan_rewards, resolve_rewards
from rdm_sdk.vision.clip import CLIP_VIT_H


def test_rewards_are_counted_and_not_made(folders: Path, tmp_path: Path) -> None:
    """By what they declare, in their dtype and on their device; what does not say how large it is, is unknown."""

    def unsaid(images: Any, prompts: Any) -> list[float]:
        return [0.0] * len(prompts)

    class Ensemble(Legibility):
        """Judges by models in a dict, of whose size it says nothing."""

        name = "ensemble"
        capabilities = replace(Legibility.capabilities, parameters=None)

        def __init__(self) -> None:
            super().__init__()
            self.others = {"first": nn.Linear(3, 4), "second": nn.Linear(3, 4)}

    plan = plan_of(folders, tmp_path, ["dm + clip[dtype=bfloat16] + 0.1*jpeg", Legibility(), Ensemble(), unsaid])
    assert plan.bytes_of("reward ensemble") == 4 * (104_618 + 2 * 16)
    assert plan.bytes_of("reward clip") == 2 * 427_616_513
    assert plan.bytes_of("reward legibility") == 4 * 104_618
    assert plan.bytes_of("reward unsaid") is None
    assert plan.unknown == ("reward unsaid",)
    assert "reward jpeg" not in [row.role for row in plan.rows]
    assert re.search(r"reward unsaid +unknown +how large it is", str(plan))
    assert re.search(r"total +at least \d", str(plan))
    elsewhere = plan_of(folders, tmp_path, "dm + clip", reward_device="cpu")
    assert elsewhere.bytes_of("reward clip") == 0
    # Offloaded, they come back while they judge, which is not while critics learn.
    assert plan_of(folders, tmp_path, "dm + clip", reward_offload=True).bytes_of("reward clip") == 4 * 427_616_513
    at_path = next(row for row in plan_of(folders, tmp_path, "dm + clip[path=here]").rows if "clip" in row.role)
    assert "if what is at its path is as large" in at_path.note


def test_a_head_is_trained_too(folders: Path, tmp_path: Path) -> None:
    """A discriminator has parameters, and the teacher's features keep a graph of their own."""
    kind = "StableDiffusion3Pipeline"  # the features are its middle block's
    with_head, without = (plan_of(folders, tmp_path, rewards, kind=kind) for rewards in ("dm + 0.1*adversarial", "dm"))
    row = next(row for row in with_head.rows if row.role == "discriminator")
    assert row.parameters == 2 * 16 + 128 * 16 + 128 + 128 + 1 + 4 * 128  # and what tells it which of four steps
    assert (with_head.bytes_of("activations") or 0) > 1.1 * (without.bytes_of("activations") or 0)
    assert with_head.peak == "the reward 'adversarial' asks the networks"


def test_planned_rewards_are_what_would_be_made() -> None:
    """The same labels, weights and capabilities, and the same complaints, with nothing loaded."""
    spec = "dm + 0.5*legibility - 2*guidance"
    made, planned = resolve_rewards(spec), plan_rewards(spec)
    for one, other in zip(made, planned, strict=True):
        assert (one.label, one.term, one.reward.capabilities) == (other.label, other.term, other.capabilities)
        assert isinstance(other, PlannedReward)
        assert other.given is None
    with pytest.raises(RewardError, match=r"no option 'pth'\. Did you mean 'path'"):
        plan_rewards("clip[pth=x]")
    with pytest.raises(RewardError, match="legibilty"):
        plan_rewards("legibilty")


CLIP_VIT_L: dict[str, Any] = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "projection_dim": 768,
}
QWEN_VL_3B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": True,
}


QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
}
OWL_V2: dict[str, Any] = {
    "hidden_size": 768,
    "image_size": 960,
    "patch_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


QWEN3_VL_8B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "tie_word_embeddings": False,
}


def hpsv3() -> list[nn.Module]:
    """Its vocabulary is Qwen2-VL's without what pads it, and a token for the score."""
    from rdm_reward_hpsv3.model import _Network

    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
    return [_Network(Qwen2VLConfig(text_config=QWEN_7B | {"vocab_size": 151658}, vision_config=vision))]


def unified() -> list[nn.Module]:
    vision = QWEN_VL_3B["vision_config"] | {"out_hidden_size": 3584}
    return [Vlm(VlmConfig(text_config=QWEN_7B, vision_config=vision, tie_word_embeddings=False))]


def aesthetic() -> list[nn.Module]:
    from rdm_reward_aesthetic.reward import make_head

    return [CLIPModel(CLIPConfig(**CLIP_VIT_L)), make_head("v2", 768)]


def image_reward() -> list[nn.Module]:
    from rdm_reward_imagereward.model import BLIP_LARGE, ImageRewardNet

    return [ImageRewardNet(BlipConfig(**BLIP_LARGE))]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "dm": list,
    "guidance": list,
    "flow": list,
    "adversarial": list,
    "jpeg": list,
    "legibility": lambda: [DigitClassifier()],
    "clip": lambda: [CLIPModel(CLIPConfig(**CLIP_VIT_L))],
    "aesthetic": aesthetic,
    "hps": lambda: [CLIPModel(CLIPConfig(**CLIP_VIT_H))],
    "pickscore": lambda: [CLIPModel(CLIPConfig(**CLIP_VIT_H))],
    "dino": lambda: [Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))],
    "imagereward": image_reward,
    "vlm": lambda: [Vlm(VlmConfig(**QWEN_VL_3B))],
    "hpsv3": hpsv3,
    "unified": unified,
    "geneval": lambda: [
        Owlv2ForObjectDetection(Owlv2Config(vision_config=OWL_V2)),
        CLIPModel(CLIPConfig(**CLIP_VIT_L)),
    ],
    "geneval2": lambda: [Qwen3VLForConditionalGeneration(Qwen3VLConfig(**QWEN3_VL_8B))],
}
"""What the rewards load by default, built without weights."""
ELSEWHERE = {"ocr", "safety", "remote", "isolated", "vlm-api", "unified-api"}
"""Their models are not PyTorch's, or not in this process."""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_rewards_declare_how_many_parameters_they_have(name: str) -> None:
    """The number is that of the published architecture, for every reward of the SDK and its plugins."""
    with torch.device("meta"):
        built = MODELS[name]()
    assert registry().load(name).capabilities.parameters == count_of(*built)


def test_every_shipped_reward_is_among_them() -> None:
    """A reward that is added says how large it is."""
    assert {name for name in registry().rewards if "/" not in name} == set(MODELS) | ELSEWHERE


def test_parts_that_training_does_not_need_are_counted(folders: Path, tmp_path: Path) -> None:
    """A safety checker, whose class is named by its pipeline's folder, goes to the device with the rest."""
    folder = tmp_path / "with_checker"
    shutil.copytree(folders / "configs" / "StableDiffusionPipeline", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small, projection_dim=4)
    (folder / "safety_checker" / "config.json").write_text(config.to_json_string())
    args = settings("StableDiffusionPipeline", blueprint(folder, torch.float32), tmp_path)
    row = next(row for row in plan_memory(folder, args).rows if row.role == "other parts")
    assert row.note == "safety_checker"
    assert row.bytes == bytes_of(blueprint(folder, torch.float32).pipeline.safety_checker) > 0


def renamed(folders: Path, folder: Path, part: str, named: list[str]) -> Path:
    """Copy a tiny pipeline's configs with another class for one of its parts."""
    shutil.copytree(folders / "configs" / "StableDiffusionPipeline", folder)
    index = json.loads((folder / "model_index.json").read_text()) | {part: named}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_parts_whose_class_has_another_name_by_now_are_stubbed_out(folders: Path, tmp_path: Path) -> None:
    """Older Stable Diffusion 1.x names `CLIPFeatureExtractor`, which transformers no longer has and diffusers maps."""
    folder = renamed(folders, tmp_path / "old", "feature_extractor", ["transformers", "CLIPFeatureExtractor"])
    args = settings("StableDiffusionPipeline", blueprint(folder, torch.float32), tmp_path)
    same = plan_memory(folders / "configs" / "StableDiffusionPipeline", args)
    assert str(plan_memory(folder, args)) == str(same)


@pytest.mark.parametrize("part", ["text_encoder", "scheduler", "unet"])
def test_modules_and_schedulers_of_unknown_classes_are_refused(folders: Path, tmp_path: Path, part: str) -> None:
    """They have a config, so they are counted, or say what the steps are."""
    folder = renamed(folders, tmp_path / "odd", part, ["diffusers", "NoSuchClass"])
    with pytest.raises(ModelError, match=r"cannot build the pipeline .* has no attribute NoSuchClass"):
        blueprint(folder, torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_module_without_its_config_is_refused(folders: Path, tmp_path: Path, part: str) -> None:
    """Left out, or made by its class's defaults, it would not be counted."""
    folder = tmp_path / "less"
    shutil.copytree(folders / "configs" / "StableDiffusionPipeline", folder)
    (folder / part / "config.json").unlink()
    with pytest.raises(ModelError, match=rf"cannot build the pipeline .*there is no {part}/config.json"):
        blueprint(folder, torch.float32)


# ---- Arithmetic -------------------------------------------------------------------------------------------------


def test_quantized_bytes_by_hand() -> None:
    """Linear weights in few bits with their scales; biases, other layers and buffers as they are."""
    module = nn.Sequential(nn.Linear(100, 48), nn.Conv2d(3, 5, 2), nn.Linear(7, 9, bias=False)).to(torch.bfloat16)
    rest = 2 * (48 + 3 * 5 * 4 + 5)
    assert quantized_bytes(module, "none") == rest + 2 * (4800 + 63)
    assert quantized_bytes(module, "8bit") == rest + (4800 + 4 * 48) + (63 + 4 * 9)
    assert quantized_bytes(module, "4bit") == rest + (2400 + 4 * 75 + 64) + (32 + 4 * 1 + 64)


def test_quantization_leaves_adapters_alone(folders: Path, tmp_path: Path) -> None:
    """Only the base shrinks: adapters stay in float32, activations as they are."""
    plans = {bits: plan_of(folders, tmp_path, quantization=bits) for bits in ("none", "8bit", "4bit")}
    for bits in ("8bit", "4bit"):
        rows = {row.role: row.bytes for row in plans[bits].rows}
        assert rows.pop("base") == quantized_bytes(blueprint(folders / "configs" / SMALL, torch.float32).backbone, bits)
        assert rows == {row.role: row.bytes for row in plans["none"].rows if row.role != "base"}


def test_optimizer_bytes_by_hand() -> None:
    """Two float32 states; in 8 bits, a byte and a share of a block's scale, but small tensors stay in float32."""
    parameters = [torch.zeros(size, device="meta") for size in (100, 4095, 4096, 10000)]
    count = 100 + 4095 + 4096 + 10000
    assert optimizer_bytes("adamw_torch", parameters) == 8 * count + 4 * 4
    assert optimizer_bytes("sgd", parameters) == 0
    eight_bits = 8 * (100 + 4095) + 2 * (4096 + 4 * 16) + 2 * (10000 + 4 * 40)
    assert optimizer_bytes("adamw_8bit", parameters) == eight_bits
    assert optimizer_bytes("adafactor", parameters) is None


def test_a_table_of_what_is_known() -> None:
    """GB are 2^30 bytes, to two digits; parameters are short; the total says what it lacks."""
    rows = (Row("base", 2_028_000_000, 3 * GB, "all"), Row("reward x", None, None), Row("activations", None, GB // 2))
    plan = MemoryPlan(rows, "judging")
    assert plan.total == 3 * GB + GB // 2
    assert [" ".join(line.split()) for line in str(plan).splitlines()] == [
        "parameters GB",
        "base 2.03 B 3.00 all",
        "reward x unknown",
        "activations 0.50",
        "total at least 3.50 at the peak: judging",
    ]


@pytest.mark.parametrize(
    ("kind", "billions"),
    [("StableDiffusion3Pipeline", 2.03), ("StableDiffusionXLPipeline", 2.57), ("FluxPipeline", 11.90)],
)
def test_true_shapes_have_their_published_size(kind: str, billions: float, tmp_path: Path) -> None:
    """Stable Diffusion 3 medium, SDXL and FLUX.1 [dev], each in a second or two and no memory."""
    family = blueprint(write_configs(tmp_path / kind, kind), torch.bfloat16)
    assert count_of(family.backbone) / 1e9 == pytest.approx(billions, abs=0.005)
    tables = bytes_of(family.backbone) - 2 * count_of(family.backbone)
    assert tables == (2 * 192**2 * 1536 if kind == "StableDiffusion3Pipeline" else 0)  # of positions


@pytest.mark.slow
def test_a_plan_of_stable_diffusion_3_medium(tmp_path: Path) -> None:
    """A run at 1,024 pixels: T5 is the largest weight, activations the largest part, and checkpointing most of them."""
    configs = write_configs(tmp_path / "sd3", "StableDiffusion3Pipeline")
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": True, "report_to": "none", "guidance_scale": 7.0}
    common |= {"per_device_train_batch_size": 2, "num_generations": 2}
    settings = [RDMConfig(**common, activation_checkpointing=again) for again in (False, True)]
    run = PlannedRun(configs, settings[0])
    plans = [replace(run, args=args).plan() for args in settings]
    assert plans[0].bytes_of("base") == 2 * 2_028_328_000 + 2 * 192**2 * 1536
    assert plans[0].bytes_of("text encoders") == pytest.approx(10.4 * GB, rel=0.01)
    activations = [plan.bytes_of("activations") or 0 for plan in plans]
    assert 16 * GB < activations[0] < 19 * GB
    assert activations[1] < activations[0] / 5
    # 24 blocks keep their inputs, of 4,096 + 333 tokens, and little besides.
    assert activations[1] > 24 * 2 * (4096 + 333) * 1536 * 2
