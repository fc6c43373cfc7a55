"""`benchmarks/study/estimators.py`: the gradients are those of their formulas, and its runs are written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from estimators import Projected, PullCritic, ScoreIdentity, evaluations, report
from test_scripts import start
from torch import Tensor, nn

from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.types import Denoiser

FACTORS = {"teacher": 0.7, "fake": 0.2}


def batch_of(shift: float, slope: float) -> RewardBatch:
    """Return a batch whose denoisers say `shift + slope x_t`, times each role's factor."""

    def denoiser(role: str) -> Denoiser:
        return lambda x_t, sigma: FACTORS[role] * (shift + slope * x_t)

    x_0 = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    context = DiffusionContext(schedule=FlowSchedule(), denoiser=denoiser, min_time=0.1, max_time=0.9)
    return RewardBatch(latents=x_0, prompts=["a"] * 6, group_size=2, decode=lambda x: x, context=context)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_the_gradient_through_both_networks(alpha: float) -> None:
    """For linear denoisers it is written out by hand."""
    batch = batch_of(0.3, 1.0)
    output = ScoreIdentity(alpha=alpha).field(batch)
    renoised = batch.require_context("here").renoise(batch.latents, 2)
    x_t, x_0 = renoised.x_t, batch.latents
    signal = (1 - renoised.sigma).reshape(-1, 1, 1, 1)
    real, fake = (FACTORS[role] * (0.3 + x_t) for role in ("teacher", "fake"))
    d, slope = real - fake, (FACTORS["teacher"] - FACTORS["fake"]) * signal
    inner = real - x_0 - alpha * d
    gradient = slope * inner + d * (FACTORS["teacher"] * signal - 1 - alpha * slope)
    assert output.gradient is not None
    torch.testing.assert_close(output.gradient, -gradient)
    torch.testing.assert_close(output.scores, -(d * inner).flatten(1).sum(1))


def test_of_constant_networks_it_is_distribution_matching() -> None:
    """Then nothing goes through x_t, and D_real - D_fake is left, whatever alpha is."""
    constant = batch_of(1.0, 1e-20)
    output = ScoreIdentity(alpha=1.2).field(constant)
    assert output.gradient is not None
    torch.testing.assert_close(output.gradient, torch.full_like(constant.latents, FACTORS["teacher"] - FACTORS["fake"]))


def test_both_parts_of_pdmd_can_be_had_alone() -> None:
    """At fresh noise what is left is orthogonal to x_0 - D_fake; not projected, all of D_real - D_fake is left."""
    batch = batch_of(0.3, 1.0)
    output = Projected().field(batch)
    renoised = batch.require_context("here").renoise(batch.latents, 2)
    real, fake = (FACTORS[role] * (0.3 + renoised.x_t) for role in ("teacher", "fake"))
    residual = (batch.latents - fake).flatten(1)
    assert output.gradient is not None
    torch.testing.assert_close((output.gradient.flatten(1) * residual).sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    whole = Projected(projected=False).field(batch)
    assert whole.gradient is not None
    torch.testing.assert_close(whole.gradient, real - fake)


def test_a_critic_is_pulled_by_its_share() -> None:
    """Of what both networks have; what critics are told the step by stays."""

    def parameters(value: float, *names: str) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(torch.full((2,), value)) for name in names}

    roles = {"fake": parameters(1.0, "weight", "step"), "student": parameters(3.0, "weight")}
    trainer: Any = SimpleNamespace(roles=SimpleNamespace(parameters_of=roles.__getitem__))
    PullCritic(trainer, 0.1).on_step_end()
    expected: dict[str, Tensor] = {"weight": torch.full((2,), 1.2), "step": torch.ones(2)}
    for name, value in expected.items():
        torch.testing.assert_close(roles["fake"][name].detach(), value)
    assert torch.equal(roles["student"]["weight"].detach(), torch.full((2,), 3.0))


@pytest.mark.slow
def test_runs_are_written_down(tmp_path: Path) -> None:
    """Each measured from the same noise; a warm start's cost counts; a second call repeats nothing."""
    out, chosen = tmp_path / "rows.jsonl", ("sid, alpha 1.2, rate 0.001", "full*.001", "warm start", "dm by both ways")
    for _ in range(2):
        start("benchmarks/study/estimators.py", "--out", out, "run", "--smoke", "--only", *chosen)
    rows = {row["cell"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert len(rows) == len(chosen) == len(out.read_text(encoding="utf-8").splitlines())
    assert all(row["last"] and len(row["FID-SD"]) == 4 for row in rows.values())
    warm = rows["warm start"]
    assert evaluations(warm) > sum(value for name, value in warm["costs"].items() if name.endswith("_forwards"))
    assert all(f"| {name} " in report(out) for name in rows)
