"""`rdm-sdk plan`: what a run takes, said from configs alone, is what it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from planned_runs import PROMPTS, SMALL, moving, plan_of, run_under_meter, settings
from usual_families import usual_families

from rdm_sdk import RDMTrainer, plan_memory
from rdm_sdk.planning import footprint
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import bytes_of
from rdm_sdk.planning.phases import Phase, Step
from rdm_sdk.planning.rehearsal import Rehearsal
from rdm_sdk.rewards.resolve import plan_rewards


@usual_families
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
            {"reward_route": "tilt", "guidance_scale": 1.0},
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
    args = settings(SMALL, blueprint(folders / SMALL, torch.float32), tmp_path, **changed)
    plan = plan_memory(folders / "configs" / SMALL, args, rewards)
    _, peak = run_under_meter(folders / SMALL, rewards, args)
    assert moving(plan) == pytest.approx(peak, rel=tolerance)
    assert re.search(said, plan.peak)


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
    monkeypatch.setattr(footprint, "FLOAT32", frozenset())
    args = settings(SMALL, blueprint(folders / SMALL, torch.float32), tmp_path, bf16=True)
    plan = plan_memory(folders / "configs" / SMALL, args)
    _, peak = run_under_meter(folders / SMALL, "dm", args)
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

    rehearsal = Rehearsal(family, family.latent_shape(32, 64))

    def phases(**changed: Any) -> dict[str, Phase]:
        args = settings(kind, family, tmp_path, **changed)
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
        fused = phases(optim="adamw_torch_fused", ema_decay=0.0)[name]
        assert fused.gradients == size[role]
        for changed in ({"optim": "adamw_torch", "ema_decay": 0.0}, {"optim": "adamw_torch_fused", "ema_decay": 0.9}):
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
    assert seen == ["encode", "judge", "judge"]  # both prompts at once
