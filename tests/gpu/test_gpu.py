"""The same code on CUDA: bf16, activation checkpointing, exact resume, and agreement with the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_runs import brightness, pictures
from peft import LoraConfig
from torch import Tensor

from rdm_sdk import digits, preset
from rdm_sdk.families.load import load_family
from rdm_sdk.method.groups import scale_field
from rdm_sdk.method.losses import pathwise_loss
from rdm_sdk.method.matching import matching_gradient, residual_magnitude
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Keep TF32 out of what is compared with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def student_gradient(device: str, dtype: torch.dtype, recompute: bool) -> dict[str, Tensor]:
    """Return the student's distribution-matching gradient for fixed weights, states and noise, on CPU in float32.

    Random generators of two devices give different numbers for one seed, so everything random is drawn on the CPU.
    """
    family = load_family(digits.teacher_path(), dtype, max_sequence_length=4)
    family.add_roles({"student": LoraConfig(r=4), "fake": LoraConfig(r=4)})
    family.to(torch.device(device))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for role in ("student", "fake"):
        for parameter in family.roles.parameters_of(role).values():
            parameter.data.copy_(0.05 * draw(*parameter.shape))
    if recompute:
        family.roles.gradient_checkpointing_enable()
    prompts = digits.prompts()[:8]
    states, eps = draw(8, *family.latent_shape(None, None)).to(device), draw(8, 1, 8, 8).to(device)
    sigma = torch.tensor([1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], device=device)
    level = torch.tensor([0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9], device=device)
    condition = {name: tensor.to(device) for name, tensor in family.encode_prompts(prompts).items()}
    denoisers = {role: family.denoiser(family.roles, role, condition) for role in ("teacher", "student", "fake")}
    x_0 = denoisers["student"](states, sigma)
    with torch.no_grad():
        x_t = (1 - level)[:, None, None, None] * x_0 + level[:, None, None, None] * eps
        real, fake = denoisers["teacher"](x_t, level), denoisers["fake"](x_t, level)
        field = scale_field(matching_gradient(real, fake), residual_magnitude(x_0, real), 2, "group")
    pathwise_loss(x_0, field).backward()
    grads = {name: p.grad for name, p in family.roles.parameters_of("student").items() if p.grad is not None}
    return {name: grad.float().cpu() for name, grad in grads.items()}


def relative_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return |one - other| / |other| over all tensors together."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in other]) for tensors in (one, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_the_students_gradient_agrees_with_cpu(dtype: torch.dtype, tolerance: float, recompute: bool) -> None:
    """From the same weights, states and noise, CUDA gives the gradient that the CPU gives in float32."""
    expected = student_gradient("cpu", torch.float32, False)
    assert max(grad.abs().max() for grad in expected.values()) > 0
    assert relative_distance(student_gradient("cuda", dtype, recompute), expected) < tolerance


def test_samples_agree_with_cpu(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """One denoising step from the same noise gives the same pictures on both devices."""
    prompts = digits.prompts()
    noise = torch.randn(len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [
        make_trainer(tmp_path, num_inference_steps=1, use_cpu=device == "cpu").sample(prompts, noise=noise).cpu()
        for device in DEVICES
    ]
    assert (images[0] - images[1]).abs().max() < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True, "activation_checkpointing": True},
        {"bf16": True, "activation_checkpointing": True, "reward_route": "tilt"},
    ],
    ids=["fp32", "bf16", "tilt"],
)
def test_ten_steps_train_as_on_cpu(make_trainer: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]) -> None:
    """Ten steps are finite, move both roles, cost what they cost on the CPU, and have losses of the same size."""
    logged = {}
    for device in DEVICES:
        shared = {"max_steps": 10, "num_generations": 2, "learning_rate": 1e-3, "guidance_scale": 1.5}
        trainer = make_trainer(
            tmp_path / device, "dm + 0.5*legibility", use_cpu=device == "cpu", ema_decay=0.9, **shared, **settings
        )
        before = [p.detach().clone() for role in ("student", "fake") for p in trainer.parameters_of(role)]
        trainer.train()
        after = [p for role in ("student", "fake") for p in trainer.parameters_of(role)]
        assert {p.device.type for p in after} == {device}
        assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > len(after) / 2
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 10
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert all(row["grad_norm"] > 0 for row in rows)
        logged[device] = rows
    for name in ("cost/student_forwards", "cost/teacher_forwards", "cost/fake_forwards", "cost/critic_steps"):
        assert logged["cuda"][-1][name] == logged["cpu"][-1][name]
    for name in ("dm/critic_loss", "dm/residual", "rewards/legibility/mean"):
        means = {device: sum(row[name] for row in rows) / len(rows) for device, rows in logged.items()}
        assert means["cuda"] == pytest.approx(means["cpu"], rel=0.3)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "own rewards": ("dm + 0.5*guidance + 0.1*adversarial", {"guidance_scale": 1.5}),
    "balance": ("dm + 0.5*legibility + 0.2*jpeg", {"weighting": "balance", "scale_rewards": "batch"}),
    "constraint": ("dm + 0.5*legibility", {"weighting": "constraint[cold_start=1,ramp=1]"}),
    "grpo": ("dm + 0.5*jpeg", preset("grpo") | {"sampler": "sde", "eta": 0.5}),
    "tilt": (["dm + 0.3*legibility + 0.2*jpeg", (brightness, 0.1)], {"reward_route": "tilt[legibility=gradient]"}),
    "reuse": ("dm + 0.2*jpeg", {"num_iterations": 3, "sampler": "cps", "eta": 0.7}),
    "fresh critic": ("dm", {"critic_rollouts": "fresh"}),
    "full copies": ("dm", {"student_weights": "full", "critic_weights": "full"}),
    "evaluated": ("dm + 0.1*legibility", {"eval_strategy": "steps", "eval_steps": 2, "log_images": 2}),
}
"""Rewards and settings that between them take every path through the step."""


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(make_trainer: Callable[..., Any], tmp_path: Path, method: str, bf16: bool) -> None:
    """Four steps on CUDA: everything logged is finite, the student moves, and it costs what it costs on the CPU."""
    rewards, settings = METHODS[method]
    costs = {}
    for device in DEVICES:
        trainer = make_trainer(
            tmp_path / device,
            rewards,
            pictures(),
            use_cpu=device == "cpu",
            bf16=bf16,
            max_steps=4,
            learning_rate=1e-3,
            eval_dataset=digits.prompts() if "eval_strategy" in settings else None,
            **({"num_generations": 4} | settings),
        )
        before = [p.detach().clone() for p in trainer.parameters_of("student")]
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters_of("student"), strict=True))
        rows = trainer.state.log_history
        assert sum("loss" in row for row in rows) == 4
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, (int, float)))
        costs[device] = trainer.costs()
    assert costs["cuda"] == costs["cpu"]


@pytest.fixture
def repeatable_convolutions() -> Iterator[None]:
    """Let cuDNN take kernels that repeat to the last bit; by default, the gradients of convolutions do not."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


@pytest.mark.usefixtures("repeatable_convolutions")
def test_resume_on_cuda_with_stored_rollouts_is_bit_exact(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """In the middle of a rollout's uses, with every kind of state there is: adversary, weighting, stored rollouts."""
    rewards = ["dm + 0.3*legibility + 0.2*adversarial", (brightness, 0.2)]
    shared = {"num_iterations": 2, "sampler": "cps", "eta": 0.7, "ema_decay": 0.9}
    shared |= {"weighting": "balance[decay=0.5]", "min_effective_sample_size": 0.0, "max_steps": 5, "use_cpu": False}
    shared |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 3e-3}
    whole = make_trainer(tmp_path / "whole", rewards, pictures(), **shared)
    whole.train()
    for stop in (1, 3):
        resumed = make_trainer(tmp_path / f"from {stop}", rewards, pictures(), **shared)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert resumed.weights == whole.weights
        for role in whole.roles.trainable_roles:
            for one, other in zip(whole.parameters_of(role), resumed.parameters_of(role), strict=True):
                assert torch.equal(one, other), (stop, role)


def test_resume_on_cuda_is_bit_exact(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """The resume law holds on CUDA as well (its random state is part of the checkpoint)."""
    shared = {"max_steps": 3, "ema_decay": 0.9, "use_cpu": False}
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=1, **shared)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for role in ("student", "fake"):
        for one, other in zip(whole.parameters_of(role), resumed.parameters_of(role), strict=True):
            assert torch.equal(one, other)


def test_rewards_agree_with_the_cpu_and_are_offloaded() -> None:
    """Scores and gradients are the CPU's; with offloading, the reward's model is back on the CPU afterwards."""
    weights = Path(__file__).parents[1] / "assets" / "digits_clip"
    reward = resolve_rewards(f'clip[path="{weights}"]')[0].reward
    images, prompts = digits.heldout_images()[:20], digits.prompts() * 2
    on_cpu = evaluate_reward(reward, RewardBatch.from_images(images, prompts))
    on_gpu = evaluate_reward(reward, RewardBatch.from_images(images.cuda(), prompts), chunk_size=6, offload=True)
    assert on_gpu.scores.device.type == "cuda"
    assert torch.allclose(on_gpu.scores.cpu(), on_cpu.scores, atol=1e-4)
    assert on_gpu.gradient is not None
    assert on_cpu.gradient is not None
    assert torch.nn.functional.cosine_similarity(on_gpu.gradient.cpu().flatten(), on_cpu.gradient.flatten(), 0) > 0.999
    assert {parameter.device.type for parameter in reward.encoder.parameters()} == {"cpu"}


def test_a_reward_on_a_device_of_its_own(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """A run on CUDA with its reward on the CPU."""
    trainer = make_trainer(tmp_path, "dm + 0.5*legibility", use_cpu=False, reward_device="cpu", bf16=True)
    trainer.train()
    assert trainer.state.global_step == 2
