"""`rdm-sdk plan`: what a run takes, said from configs alone, is what it takes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES
from torch import nn
from transformers import BlipConfig, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers import Qwen2_5_VLConfig as VlmConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Vlm
from true_shapes import write_configs

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer, RewardError, digits, plan_memory
from rdm_sdk.cli.main import main
from rdm_sdk.digits.classifier import DigitClassifier
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.planning import blueprint as blueprints
from rdm_sdk.planning import footprint
from rdm_sdk.planning.advice import Run, Switch, advise, show_advice
from rdm_sdk.planning.blueprint import CONFIGS, blueprint
from rdm_sdk.planning.footprint import Meter, bytes_of, count_of
from rdm_sdk.planning.phases import Phase, Step
from rdm_sdk.planning.plan import GB, MemoryPlan, Planner, Row, optimizer_bytes, quantized_bytes
from rdm_sdk.planning.rehearsal import Rehearsal
from rdm_sdk.plugins.registry import registry
from rdm_sdk.rewards.resolve import PlannedReward, plan_rewards, resolve_rewards
from rdm_sdk.vision.clip import CLIP_VIT_H

PROMPTS = ["a handwritten one, drawn with a brush", "a handwritten two, drawn with a pencil"]
CLIP_ONLY = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
by_family = pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every family's tiny pipeline, and in `configs` the same without weights and tokenizers."""
    root = tmp_path_factory.mktemp("tiny")
    for name, make in TINY_PIPELINES.items():
        make().save_pretrained(root / name)
        for file in (root / name).rglob("*config.json"):
            if file.parent != root / name and "tokenizer" not in file.name:
                target = root / "configs" / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        shutil.copy(root / name / "model_index.json", root / "configs" / name)
    assert not list((root / "configs").rglob("*.safetensors"))
    return root


def settings(kind: str, family: ModelFamily, output_dir: Path, **changed: Any) -> RDMConfig:
    """Return the settings of a small run with a family, two samples for each of the two prompts."""
    unit = family.size_unit
    height = -(-32 // unit) * unit
    given: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "guidance_scale": 1.0 if family.guidance == "none" else 3.0,
        "critic_steps": 1,
        "max_steps": 2,
        "height": height,
        "width": 2 * height,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    given |= {} if kind in CLIP_ONLY else {"max_sequence_length": 24}
    return RDMConfig(**(given | changed))


def moving(plan: MemoryPlan) -> int:
    """Return the bytes that a run makes itself: all but the weights that it is given."""
    rows = ("optimizer", "gradients", "activations", "moving average")
    return sum(row.bytes or 0 for row in plan.rows if row.role in rows)


def run_under_meter(folder: Path, rewards: Any, args: RDMConfig, **loras: Any) -> tuple[RDMTrainer, int]:
    """Train, and return the trainer and the most bytes that were alive at once of what training made."""
    trainer = RDMTrainer(str(folder), rewards, args, PROMPTS, **loras)
    trainer.models.encode([*PROMPTS, None])  # encoders take nothing between uses
    with Meter() as meter:
        trainer.train()
    average = [] if trainer.models.ema is None else trainer.models.ema.shadow_params  # the constructor made it
    return trainer, meter.peak + sum(4 * parameter.numel() for parameter in average)


@by_family
def test_plan_is_what_a_real_run_takes(kind: str, folders: Path, tmp_path: Path) -> None:
    """Weights and optimizer to the byte, and the rest within 5 %, on the CPU, where attention is fused as well."""
    configs = folders / "configs" / kind
    args = settings(kind, blueprint(configs, torch.float32), tmp_path)
    lora = LoraConfig(r=4)
    plan = plan_memory(configs, args, "dm", lora)
    trainer, peak = run_under_meter(folders / kind, "dm", args, peft_config=lora)
    family = trainer.family
    assert plan.bytes_of("VAE") == bytes_of(family.pipeline.vae)
    assert plan.bytes_of("text encoders") == bytes_of(*family.text_encoders().values())
    own = {role: trainer.parameters_of(role) for role in ("student", "fake")}
    for role, parameters in own.items():
        assert plan.bytes_of(role) == sum(4 * parameter.numel() for parameter in parameters)
    told = sum(4 * p.numel() for p in trainer.roles.embedding_parameters_of("fake").values())  # not in the backbone
    assert told > 0
    adapters = sum(4 * p.numel() for r in own.values() for p in r) - told
    assert plan.bytes_of("base") == bytes_of(family.backbone) - adapters
    optimizers = (trainer.optimizer, trainer.critic_optimizer.optimizer)
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    assert plan.bytes_of("optimizer") == sum(value.numel() * value.element_size() for value in states)
    assert moving(plan) == pytest.approx(peak, rel=0.05)
    assert "asks the networks" in plan.peak


@pytest.mark.parametrize(
    ("changed", "rewards", "tolerance", "said"),
    [
        ({"activation_checkpointing": True}, "dm", 0.1, "pass|networks"),
        ({"gradient_accumulation_steps": 2, "ema_decay": 0.9}, "dm", 0.05, "networks"),
        ({"reward_batch_size": 2}, "dm + 0.5*legibility", 0.15, "decoded and differentiated"),
        ({"reward_route": "tilt"}, "dm + 0.5*legibility", 0.15, "carried back|asks the networks|decoded"),
        (
            {"reward_route": "tilt", "num_draws": 5, "guidance_scale": 1.0},
            "dm + 0.5*legibility",
            0.15,
            "decoded and differentiated",
        ),
        ({"num_iterations": 2, "gradient_accumulation_steps": 2}, "dm", 0.1, "critic"),
        ({"guidance_scale": 1.0}, "dm + 0.5*guidance", 0.05, "asks the networks"),
        ({"student_weights": "full", "critic_weights": "full"}, "dm", 0.05, ""),
        ({"resolutions": ["32x32", "64x64"], "height": None, "width": None, "max_steps": 8}, "dm", 0.05, "networks"),
    ],
    ids=[
        "checkpointing",
        "accumulation",
        "pixels",
        "tilt",
        "tilt of five draws",
        "reuse",
        "guidance",
        "full",
        "resolutions",
    ],
)
def test_plan_follows_the_settings(
    changed: dict[str, Any], rewards: str, tolerance: float, said: str, folders: Path, tmp_path: Path
) -> None:
    """The same for a run that is set up otherwise; what a reward's own model saves is left out."""
    kind = "StableDiffusion3Pipeline"
    args = settings(kind, blueprint(folders / kind, torch.float32), tmp_path, **changed)
    plan = plan_memory(folders / "configs" / kind, args, rewards)
    _, peak = run_under_meter(folders / kind, rewards, args)
    assert moving(plan) == pytest.approx(peak, rel=tolerance)
    assert re.search(said, plan.peak)


def plan_of(folders: Path, tmp_path: Path, rewards: Any = "dm", lora: Any = None, **changed: Any) -> MemoryPlan:
    """Return the plan of a small run with the tiny Stable Diffusion 3."""
    kind = "StableDiffusion3Pipeline"
    configs = folders / "configs" / kind
    return plan_memory(configs, settings(kind, blueprint(configs, torch.float32), tmp_path, **changed), rewards, lora)


def test_what_waits_elsewhere_takes_nothing(folders: Path, tmp_path: Path) -> None:
    """Encoders and VAE on the CPU, or gone, are not on the device at the peak, unless their work is the peak."""
    kept = plan_of(folders, tmp_path)
    for place in ("offload", "drop"):
        away = plan_of(folders, tmp_path, text_encoders=place)
        assert away.bytes_of("text encoders") == 0
        assert kept.total - away.total == kept.bytes_of("text encoders")
    vae = plan_of(folders, tmp_path, vae_offload=True)
    assert kept.total - vae.total == kept.bytes_of("VAE")
    # Smaller passes than encoders: then the peak is where these are at work.
    small = {"per_device_train_batch_size": 1, "num_generations": 1, "num_inference_steps": 1, "lora": LoraConfig(r=1)}
    small |= {
        "activation_checkpointing": True,
        "height": 8,
        "width": 8,
        "max_sequence_length": 1,
        "guidance_scale": 1.0,
    }
    for place, peak in (("offload", "encoding prompts"), ("drop", "start")):
        plan = plan_of(folders, tmp_path, text_encoders=place, **small)
        assert plan.peak.startswith(peak)
        assert plan.bytes_of("text encoders") == kept.bytes_of("text encoders")
        assert bool(plan.bytes_of("optimizer")) == (place == "offload")


def test_bfloat16_runs_under_autocast(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run in bfloat16, with the CPU's shorter list of float32 functions in the plan."""
    kind = "StableDiffusion3Pipeline"
    monkeypatch.setattr(footprint, "FLOAT32", frozenset())
    args = settings(kind, blueprint(folders / kind, torch.float32), tmp_path, bf16=True)
    plan = plan_memory(folders / "configs" / kind, args)
    _, peak = run_under_meter(folders / kind, "dm", args)
    assert moving(plan) == pytest.approx(peak, rel=0.05)
    single = plan_of(folders, tmp_path)
    assert plan.bytes_of("base") == (single.bytes_of("base") or 0) / 2
    assert plan.bytes_of("VAE") == single.bytes_of("VAE")


def test_a_moving_average_is_another_copy(folders: Path, tmp_path: Path) -> None:
    """Of the student alone, in float32."""
    plan = plan_of(folders, tmp_path, ema_decay=0.9)
    assert plan.bytes_of("moving average") == plan.bytes_of("student")


def test_gradients_and_scratch_are_where_the_trainer_has_them(folders: Path, tmp_path: Path) -> None:
    """Gradients come up in backward passes and wait between micro-batches; unfused steps make one more copy."""
    kind = "StableDiffusion3Pipeline"
    family = blueprint(folders / "configs" / kind, torch.float32)
    with torch.device("meta"):
        family.add_roles({"student": LoraConfig(r=4), "fake": LoraConfig(r=8)})
    size = {role: 4 * sum(p.numel() for p in family.roles.parameters_of(role).values()) for role in ("student", "fake")}
    assert 2 * size["student"] == size["fake"] > 0

    def phases(**changed: Any) -> dict[str, Phase]:
        args = settings(kind, family, tmp_path, **changed)
        rehearsal = Rehearsal(family, family.latent_shape(32, 64))
        return {phase.name: phase for phase in Step(rehearsal, args, plan_rewards("dm")).phases()}

    once, twice = phases(), phases(gradient_accumulation_steps=2)
    for role, name in (("student", "the student"), ("fake", "the critic 'fake'")):
        forward, backward = f"the forward pass of {name}", f"the backward pass of {name}"
        assert (once[forward].gradients, once[backward].gradients) == (0, size[role])
        assert twice[forward].gradients == twice[backward].gradients == size[role]
        # A second backward pass adds to gradients that are there, so it takes no less beside them.
        assert twice[backward].activations >= once[backward].activations
    assert twice["the reward 'dm' asks the networks"].gradients == size["student"]
    steps = {"the optimizer's step": "student", "the critics' optimizer step": "fake"}
    for name, role in steps.items():
        fused = phases(optim="adamw_torch_fused")[name]
        assert fused.gradients == size[role]
        for changed in ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused", "ema_decay": 0.9}):
            assert phases(**changed)[name].activations == fused.activations + size[role]


def test_no_encoder_works_while_a_graph_waits(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan relies on: offloaded encoders come to the device before the student's graph is there."""
    kind = "StableDiffusion3Pipeline"
    args = settings(kind, blueprint(folders / kind, torch.float32), tmp_path, text_encoders="offload")
    trainer = RDMTrainer(str(folders / kind), "dm", args, PROMPTS)
    seen: list[str] = []
    encode, judge = trainer.family.encode_prompts, trainer.judge.judge
    monkeypatch.setattr(trainer.family, "encode_prompts", lambda prompts: seen.append("encode") or encode(prompts))
    monkeypatch.setattr(trainer.judge, "judge", lambda experience: seen.append("judge") or judge(experience))
    trainer.train()
    assert seen == ["encode", "encode", "judge", "judge"]


def test_rewards_are_counted_and_not_made(folders: Path, tmp_path: Path) -> None:
    """By what they declare, in their dtype and on their device; what does not say how large it is, is unknown."""

    def unsaid(images: Any, prompts: Any) -> list[float]:
        return [0.0] * len(prompts)

    plan = plan_of(folders, tmp_path, ["dm + clip[dtype=bfloat16] + 0.1*jpeg", Legibility(), unsaid])
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
    with_head, without = (plan_of(folders, tmp_path, rewards) for rewards in ("dm + 0.1*adversarial", "dm"))
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


def aesthetic() -> list[nn.Module]:
    from rdm_reward_aesthetic.reward import make_head

    return [CLIPModel(CLIPConfig(**CLIP_VIT_L)), make_head("v2", 768)]


def image_reward() -> list[nn.Module]:
    from rdm_reward_imagereward.model import BLIP_LARGE, ImageRewardNet

    return [ImageRewardNet(BlipConfig(**BLIP_LARGE))]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "dm": list,
    "guidance": list,
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
}
"""What the rewards load by default, built without weights."""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_rewards_declare_how_many_parameters_they_have(name: str) -> None:
    """The number is that of the published architecture, for every reward of the SDK and its plugins."""
    with torch.device("meta"):
        built = MODELS[name]()
    assert registry().load(name).capabilities.parameters == count_of(*built)


def test_every_shipped_reward_is_among_them() -> None:
    """A reward that is added says how large it is."""
    assert {name for name in registry().rewards if "/" not in name} == set(MODELS)


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
        assert rows.pop("base") == quantized_bytes(
            blueprint(folders / "configs/StableDiffusion3Pipeline", torch.float32).backbone, bits
        )
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


def test_a_plan_of_stable_diffusion_3_medium(tmp_path: Path) -> None:
    """A run at 1,024 pixels: T5 is the largest weight, activations the largest part, and checkpointing most of them."""
    planner = Planner(write_configs(tmp_path / "sd3", "StableDiffusion3Pipeline"))
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": True, "report_to": "none", "guidance_scale": 7.0}
    common |= {"per_device_train_batch_size": 2, "num_generations": 2}
    plans = [planner.plan(RDMConfig(**common, activation_checkpointing=again)) for again in (False, True)]
    assert plans[0].bytes_of("base") == 2 * 2_028_328_000 + 2 * 192**2 * 1536
    assert plans[0].bytes_of("text encoders") == pytest.approx(10.4 * GB, rel=0.01)
    activations = [plan.bytes_of("activations") or 0 for plan in plans]
    assert 16 * GB < activations[0] < 19 * GB
    assert activations[1] < activations[0] / 5
    # 24 blocks keep their inputs, of 4,096 + 333 tokens, and little besides.
    assert activations[1] > 24 * 2 * (4096 + 333) * 1536 * 2


# ---- Advice -----------------------------------------------------------------------------------------------------


def advised_run(folders: Path, tmp_path: Path, **changed: Any) -> Run:
    kind = "StableDiffusion3Pipeline"
    configs = folders / "configs" / kind
    args = settings(kind, blueprint(configs, torch.float32), tmp_path, **changed)
    return Run(Planner(configs), args, "dm + 0.5*legibility", LoraConfig(r=16, lora_alpha=16))


def test_advice_is_what_the_switched_run_takes(folders: Path, tmp_path: Path) -> None:
    """Each switch is planned alone, the largest first; a plan made afresh has the same total."""
    run = advised_run(folders, tmp_path)
    before = run.plan().total
    memory = int(0.6 * before)
    savings = advise(run, memory)
    assert [one.saved for one in savings] == sorted((one.saved for one in savings), reverse=True)
    assert {one.fits for one in savings} == {True, False}
    for one in savings:
        fresh = advised_run(folders, tmp_path).switched(one.switch).plan()
        assert before - fresh.total == one.saved > 0
        assert one.fits == (fresh.total <= memory)
    assert run.plan().total == before  # the run itself is as it was
    lines = show_advice(savings).splitlines()[1:]
    assert [line.split("  ")[1] for line in lines] == [str(one.switch) for one in savings]
    assert [line.endswith("GB, then it fits") for line in lines] == [one.fits for one in savings]


def test_advice_says_when_nothing_helps() -> None:
    """A run with nothing to switch on."""
    assert "take a larger device, or smaller images" in show_advice([])


def test_switches_are_written_as_flags() -> None:
    """As on the command line."""
    assert str(Switch("text_encoders", "drop")) == "--text_encoders drop"
    assert str(Switch("vae_offload", True)) == "--vae_offload"
    assert str(Switch("lora_r", 8)) == "--lora_r 8"


def test_a_batch_is_halved_in_whole_groups(folders: Path, tmp_path: Path) -> None:
    """Of three groups of two, one is left; one group is not halved."""
    for size, half in ((6, 2), (8, 4), (2, None)):
        run = advised_run(folders, tmp_path, per_device_train_batch_size=size)
        sizes = [switch.value for switch in run.switches() if switch.name == "per_device_train_batch_size"]
        assert sizes == ([] if half is None else [half])


def test_switches_that_are_on_are_not_offered(folders: Path, tmp_path: Path) -> None:
    """Nor those that exclude what is on."""
    on = {"activation_checkpointing": True, "text_encoders": "offload", "vae_offload": True, "vae_slicing": True}
    on |= {"optim": "adamw_8bit", "reward_offload": True, "reward_batch_size": 1, "per_device_train_batch_size": 2}
    run = advised_run(folders, tmp_path, **on)
    assert [str(switch) for switch in run.switches()] == [
        "--text_encoders drop",
        "--quantization 8bit",
        "--quantization 4bit",
        "--lora_r 8",
    ]
    full = Run(run.planner, RDMConfig(output_dir=str(tmp_path), use_cpu=True, student_weights="full", report_to="none"))
    offered = [str(switch) for switch in full.switches()]
    assert "--student_weights lora" in offered
    assert not any("quantization" in switch for switch in offered)


# ---- The command line -------------------------------------------------------------------------------------------

SMALL = ["--num_generations", "2", "--max_sequence_length", "4"]


def test_the_digits_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per part, and exit status 0 where it fits."""
    assert main(["plan", "--model", "digits", "--per_device_train_batch_size", "4", *SMALL, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    rows = ("base", "student", "fake", "optimizer", "VAE", "text encoders", "gradients", "activations", "total")
    for row in rows:
        assert re.search(rf"^{row} .*\d\.\d\d", printed, re.MULTILINE), row
    assert "fits into 1.00 GB" in printed


def test_too_little_memory_is_said_before_loading(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and advice; there are no weights to load; the flags that are advised lead to exit status 0."""
    configs = str(folders / "configs" / "FluxPipeline")
    command = [
        "plan",
        "--model",
        configs,
        "--per_device_train_batch_size",
        "8",
        *SMALL,
        "--height",
        "64",
        "--width",
        "64",
    ]
    command += ["--rewards", "dm + 0.5*legibility"]
    memory = ["--memory", "0.015"]
    assert main([*command, *memory]) == 1
    printed = capsys.readouterr().out
    assert "does not fit into 0.01 GB; what each of these would save by itself:" in printed
    flags = re.findall(r"^  (--.*?)  +\d+\.\d\d GB, then it fits$", printed, re.MULTILINE)
    assert flags
    for advised in flags:
        assert main([*command, *memory, *advised.split()]) == 0, advised


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nowhere"], "there is no such folder"),
        (["--model", "{empty}"], "the folder has no model_index.json"),
        (["--model", "{video}"], "WanPipeline is not supported"),
        (["--model", "{broken}"], "cannot build the pipeline in"),
        (["--model", "{torn}"], "cannot read"),
        (
            ["--model", "digits", "--per_device_train_batch_size", "6", "--num_generations", "4"],
            "must be a multiple of num_generations=4",
        ),
        (["--model", "digits", "--memory", "0"], "--memory must be a positive number of GB; got 0.0"),
        (["--model", "digits", "--lora_r", "0"], "--lora_r must be at least 1; got 0"),
        (["--model", "digits", "--rewards", "dm + klip"], "klip"),
        (["--model", "digits", "--optim", "adamm"], "invalid choice: 'adamm'"),
        (["--model", "digits", "--height", "33", "--width", "32"], "positive multiples of 8"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be planned is said in one line."""
    for name, index in (("video", {"_class_name": "WanPipeline"}), ("broken", {"_class_name": "FluxPipeline"})):
        (tmp_path / name).mkdir()
        index |= {} if name == "video" else {"transformer": ["diffusers", "FluxTransformer2DModel"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("{")
    places = {name: str(tmp_path / name) for name in ("empty", "video", "broken", "torn")}
    assert main(["plan", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("rdm-sdk: ")]) == 1


def test_only_configs_are_downloaded(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id, the JSON files that say shapes; a hub that cannot be reached is said to be so."""
    import huggingface_hub

    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        if repository == "some/where":
            raise OSError("no route to host")
        return str(folders / "configs" / "FluxPipeline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert blueprint("some/flux", torch.float32).base_name == "some/flux"
    assert asked == [("some/flux", list(CONFIGS))]
    assert all(pattern.endswith(".json") for pattern in CONFIGS)
    with pytest.raises(
        ModelError, match="cannot reach the hub for the configs of 'some/where': OSError: no route to ho"
    ):
        blueprint("some/where", torch.float32)


def test_a_loaded_model_is_not_planned() -> None:
    """Its configs have to be named; and a family that has no example is named itself."""
    with pytest.raises(ModelError, match="pass its hub id or the path of its folder; got a list"):
        blueprints.blueprint([], torch.float32)

    class Plain(type(load_family(digits.teacher_path(), torch.float32))):  # type: ignore[misc]
        example_encoding = ModelFamily.example_encoding

    with pytest.raises(ModelError, match="Plain names no example_encoding"):
        Plain(blueprint(digits.teacher_path(), torch.float32).pipeline).example_encoding(1)


def test_planning_says_what_training_says(folders: Path, tmp_path: Path) -> None:
    """LoRA configs that cannot be used are refused here too."""
    with pytest.raises(ConfigError, match="lora_dropout"):
        plan_of(folders, tmp_path, lora=LoraConfig(r=4, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="peft_config describes adapters"):
        plan_of(folders, tmp_path, lora=LoraConfig(r=4), student_weights="full")


def test_the_benchmark_of_full_sizes_runs(folders: Path, tmp_path: Path) -> None:
    """On a tiny model, without a GPU: every figure of its table is there."""
    settings = {"height": 32, "width": 32, "use_cpu": True, "reward_batch_size": 1, "critic_steps": 2}
    run = full_size.Run("tiny", "sd3", settings, brightness=0.1)
    measured = full_size.measure(run, str(folders / "configs" / "StableDiffusion3Pipeline"), "cpu")
    # Rollouts of all four steps, two of the teacher and one of the critic; the rest is learned from.
    bare = 7 * measured["evaluation_s"] + 3 * measured["learning_s"]
    assert measured["bare_s"] == pytest.approx(bare)
    assert measured["step_s"] > 0
    assert "| tiny |" in full_size.table([measured])


# ---- A GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sd3", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_is_what_a_gpu_allocates(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """True shapes with random weights at 512 pixels: the allocator's peak is the plan's, activations within 20 %.

    With `pytest -s`, it prints the figures and the time of a step.
    """
    settings = {
        "height": 512,
        "width": 512,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": checkpointing,
    }
    run = full_size.Run(f"{kind}, {checkpointing=}", kind, settings)
    measured = full_size.measure(run, full_size.shapes_of(tmp_path, kind))
    print(f"\n{full_size.table([measured])}")
    assert measured["planned_activations_gb"] == pytest.approx(measured["allocated_activations_gb"], rel=0.2)
    assert measured["planned_gb"] == pytest.approx(measured["allocated_gb"], rel=0.1)
