"""What `dm` teaches its critic, and the figures that tell how well the critic follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.method.matching import across
from rdm_sdk.method.noise import FlowSchedule, NoiseSchedule, VariancePreservingSchedule, add_noise
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import DiffusionContext, Origin
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.types import Denoiser

X_0 = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.5, 1.0])


def batch(
    seen: list[Tensor], weights: Tensor | None = None, ends: tuple[Tensor | float, Tensor | float] = (0.1, 0.3)
) -> RewardBatch:
    """Return samples in groups of three whose critic is off by `OFFSETS`, and whose teacher by 0.1.

    The levels at which the critic is asked are added to `seen`; `ends` are those of the student's update.
    """

    def denoiser(role: str) -> Denoiser:
        def denoised(x_t: Tensor, sigma: Tensor) -> Tensor:
            if role == "teacher":
                return X_0 + 0.1
            seen.append(sigma)
            return X_0 + OFFSETS[:, None, None]

        return denoised

    context = DiffusionContext(
        schedule=FlowSchedule(), denoiser=denoiser, min_time=ends[0], max_time=ends[1], critic_times=(0.5, 0.9)
    )
    prompts = ["a seven"] * 6
    return RewardBatch(latents=X_0, prompts=prompts, group_size=3, decode=lambda z: z, context=context, weights=weights)


def test_the_critic_counts_samples_by_their_weights() -> None:
    """Its loss is the mean of weight times squared error of the flow, at times of its own."""
    weights = torch.tensor([1.0, 0.0, 0.2, 3.0, 1.5, 0.5])
    for given, expected in ((weights, weights), (None, torch.ones(6))):
        seen: list[Tensor] = []
        loss = DistributionMatching().training_loss(batch(seen, given))
        (sigma,) = seen
        torch.testing.assert_close(loss, (expected * OFFSETS.square() / sigma.square()).sum() / 6)
        assert bool(((sigma >= 0.5) & (sigma <= 0.9)).all())


def test_figures_of_the_critic() -> None:
    """Squares per value: of teacher minus critic, of sample minus critic, and what a group's errors have in common."""
    figures = DistributionMatching().field(batch([])).figures
    torch.testing.assert_close(figures["gap"], (OFFSETS - 0.1).square())
    torch.testing.assert_close(figures["error"], OFFSETS.square())
    others = [(-1.0 + 2.0) / 2, (0.5 + 2.0) / 2, (0.5 - 1.0) / 2, (-0.5 + 1.0) / 2, (0.25 + 1.0) / 2, (0.25 - 0.5) / 2]
    torch.testing.assert_close(figures["lag"], OFFSETS * torch.tensor(others))


def test_the_score_is_an_integral_over_the_times_of_each_sample() -> None:
    """Half the error difference at the drawn level, by the slope of the log-SNR and by how long the interval is."""
    low, high = torch.full((6,), 0.25), torch.tensor([0.5, 0.5, 0.75, 0.3, 0.9, 0.6])
    for ends, span in (((0.1, 0.3), torch.full((6,), 0.2)), ((low, high), high - low)):
        seen: list[Tensor] = []
        scores = DistributionMatching().score(batch(seen, ends=ends))
        (sigma,) = seen
        slope = 2 / sigma + 2 / (1 - sigma)  # of log((1 - sigma)^2 / sigma^2)
        errors = 4 * (OFFSETS.square() - 0.1**2)  # four values per sample
        torch.testing.assert_close(scores, 0.5 * (1 / sigma - 1).square() * slope * span * errors, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VariancePreservingSchedule()])
def test_on_the_path_samples_have_the_noise_of_their_states(schedule: NoiseSchedule) -> None:
    """In the place of fresh noise, at the same levels; whose states are not known cannot be asked."""
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 1.0, 0.5])
    noise = torch.randn(X_0.shape, generator=torch.Generator().manual_seed(1))
    states = add_noise(schedule, X_0, noise, levels)
    origin = Origin(states, levels, torch.zeros(6, dtype=torch.long), teacher_of=lambda rows: lambda x_t, sigma: x_t)
    context = replace(batch([]).require_context("here"), schedule=schedule, on_path=True)
    with pytest.raises(RewardError, match="no state is known"):
        context.renoise(X_0, 3)
    renoised = replace(context, origin=origin).renoise(X_0, 3)
    torch.testing.assert_close(renoised.x_t, add_noise(schedule, X_0, noise, renoised.sigma), rtol=1e-4, atol=1e-5)
    assert ((renoised.sigma > 0.1) & (renoised.sigma < 0.3)).all()


def test_on_the_path_the_gradient_is_across_the_critic_s_residual() -> None:
    """PDMD's: orthogonal to x_0 - D_fake, and what was taken away is parallel to it; the divisor is that of `dm`."""
    real, fake = (torch.randn(X_0.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    level = torch.full((6,), 0.5)
    origin = Origin(X_0, level, level.long(), teacher_of=lambda rows: lambda x_t, sigma: x_t)
    told = batch([])
    context = replace(
        told.require_context("here"),
        denoiser=lambda role: lambda x_t, sigma: real if role == "teacher" else fake,
        on_path=True,
        origin=origin,
    )
    output = DistributionMatching().field(replace(told, context=context))
    assert output.gradient is not None
    assert output.magnitude is not None
    residual, taken = (X_0 - fake).flatten(1), (real - fake - output.gradient).flatten(1)
    torch.testing.assert_close((output.gradient.flatten(1) * residual).sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cosine_similarity(taken, residual).abs(), torch.ones(6))
    torch.testing.assert_close(output.magnitude, (X_0 - real).abs().flatten(1).mean(1))


def test_a_critic_without_an_error_leaves_the_gradient_as_it_is() -> None:
    """Nothing lies along a direction of zero."""
    vectors = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    along = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    expected = torch.stack([vectors[0], vectors[1] * torch.tensor([1.0, 0.0, 1.0])])
    torch.testing.assert_close(across(vectors, along), expected)
