"""Law 3: group normalization with one sample per group is DMD2; the pathwise loss is the pseudo-target loss."""

import math

import pytest
import torch

from rdm_sdk.method.groups import group_scale, scale_field
from rdm_sdk.method.losses import pathwise_loss
from rdm_sdk.method.matching import matching_gradient, residual_magnitude

SHAPE = (6, 3, 4, 4)
NAN = math.nan


def denoised(seed=0):
    """Return x_0, D_real and D_fake, with a different scale of disagreement for each sample."""
    generator = torch.Generator().manual_seed(seed)
    x_0, d_real, d_fake = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    spread = torch.linspace(0.2, 3, SHAPE[0])[:, None, None, None]
    return x_0, x_0 + spread * d_real, x_0 + d_fake


def test_groups_of_one_are_dmd2():
    """Law 3: with group_size=1 the loss and its gradient equal DMD2's, computed here one sample at a time."""
    x_0, d_real, d_fake = denoised()
    ours = x_0.clone().requires_grad_()
    field = scale_field(matching_gradient(d_real, d_fake), residual_magnitude(x_0, d_real), 1, "group")
    loss = pathwise_loss(ours, field)
    loss.backward()

    total = torch.zeros(())
    theirs = x_0.clone().requires_grad_()
    for sample, real, fake in zip(theirs, d_real, d_fake, strict=True):
        normalizer = (sample.detach() - real).abs().sum() / real.numel()
        descent = (fake - real) / normalizer
        pseudo_target = sample.detach() - descent
        total = total + 0.5 * torch.nn.functional.mse_loss(sample, pseudo_target) / SHAPE[0]
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_groups_of_one_are_per_sample_normalization():
    """Law 3: with group_size=1, "group" is "sample" bit for bit; "sample" ignores the group size."""
    x_0, d_real, d_fake = denoised()
    field, magnitudes = matching_gradient(d_real, d_fake), residual_magnitude(x_0, d_real)
    one_by_one = scale_field(field, magnitudes, 1, "group")
    assert torch.equal(one_by_one, scale_field(field, magnitudes, 1, "sample"))
    assert torch.equal(one_by_one, scale_field(field, magnitudes, 3, "sample"))


def test_pathwise_loss_is_the_pseudo_target_loss():
    """Law 3: pathwise_loss has the value and gradient of 1/2 mse(x_0, stop_gradient(x_0 + field))."""
    generator = torch.Generator().manual_seed(1)
    x_0, field = (torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(2))
    loss = pathwise_loss(x_0, field)
    pseudo_target = 0.5 * torch.nn.functional.mse_loss(x_0, (x_0 + field).detach())
    torch.testing.assert_close(loss, pseudo_target)
    ours, through_field = torch.autograd.grad(loss, [x_0, field], allow_unused=True)
    (theirs,) = torch.autograd.grad(pseudo_target, x_0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours, -field.detach() / x_0.numel())
    assert through_field is None


def test_relative_magnitudes_survive_only_in_groups():
    """Law 3: "group" divides by the group's mean magnitude and keeps ratios inside it; "sample" levels them."""
    x_0, d_real, _ = denoised()
    field, magnitudes = d_real - x_0, residual_magnitude(x_0, d_real)

    def relative(scaled):
        sizes = scaled.abs().mean((1, 2, 3)).reshape(2, 3)
        return sizes / sizes[:, :1]

    raw = relative(field)
    grouped = scale_field(field, magnitudes, 3, "group")
    torch.testing.assert_close(relative(grouped), raw)
    torch.testing.assert_close(grouped.abs().mean((1, 2, 3)).reshape(2, 3).mean(1), torch.ones(2))
    leveled = scale_field(field, magnitudes, 3, "sample")
    torch.testing.assert_close(relative(leveled), torch.ones(2, 3))
    assert (raw - 1).abs().max() > 0.5


def test_divisors_of_each_normalization():
    """Law 3: the divisors are the sample's, the group's mean and the batch's mean magnitude."""
    magnitudes = torch.tensor([1.0, 3.0, 2.0, 6.0])
    expected = {"sample": [1.0, 3.0, 2.0, 6.0], "group": [2.0, 2.0, 4.0, 4.0], "batch": [3.0, 3.0, 3.0, 3.0]}
    for normalization, divisors in expected.items():
        assert group_scale(magnitudes, 2, normalization).tolist() == divisors
    assert group_scale(magnitudes, 2).tolist() == expected["group"]


@pytest.mark.parametrize("normalization", ["group", "batch"])
def test_missing_magnitudes_are_left_out(normalization):
    """Law 3: NaN magnitudes are in no statistic; where nothing is left the divisor is 0."""
    got = group_scale(torch.tensor([1.0, NAN, 2.0, 3.0]), 4, normalization)
    assert got.tolist() == [2.0] * 4
    assert group_scale(torch.tensor([NAN, NAN]), 2, normalization).tolist() == [0.0, 0.0]
    assert group_scale(torch.tensor([NAN, 3.0]), 2, "sample").tolist() == [0.0, 3.0]


def test_scaling_keeps_the_drift_a_group_shares():
    """Law 3: a field is scaled and never centered, so a drift that all samples share stays."""
    drift = torch.full((4, 8), 0.7)
    scaled = scale_field(drift, torch.full([4], 0.5), 4, "group")
    torch.testing.assert_close(scaled, torch.full((4, 8), 1.4))


def test_vanishing_scale_stays_finite():
    """Law 3: where the student already agrees with the teacher, the divisor is float32's epsilon, not 0."""
    epsilon = torch.finfo(torch.float32).eps
    scaled = scale_field(torch.full((2, 5), epsilon), torch.tensor([0.0, 2.0]), 1, "group")
    torch.testing.assert_close(scaled, torch.tensor([1.0, epsilon / 2])[:, None].expand(2, 5))
    assert (scale_field(torch.zeros(2, 5), torch.zeros(2), 2, "group") == 0).all()


@pytest.mark.parametrize("shape", [(), (6, 1), (6, 3, 4, 4)], ids=str)
def test_divisors_come_from_one_magnitude_per_sample(shape):
    """Law 3: group_scale rejects anything but `[N]`."""
    with pytest.raises(ValueError, match="one value per sample"):
        group_scale(torch.ones(shape), 1)


def test_scaling_rejects_magnitudes_of_another_batch():
    """Law 3: a field is never broadcast against the magnitudes of fewer samples."""
    with pytest.raises(ValueError, match="one value per sample"):
        scale_field(torch.ones(4, 5), torch.ones(1), 1, "group")
