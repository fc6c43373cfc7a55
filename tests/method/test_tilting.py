"""The covariance of samples and scores in a group."""

import math

import pytest
import torch
from torch import Tensor

from rdm_sdk.method.noise import FlowSchedule, add_noise
from rdm_sdk.method.tilting import group_covariance

SCHEDULE = FlowSchedule()
NAN = float("nan")


def example(groups: int = 2, size: int = 4, shape: tuple[int, ...] = (3, 2)) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, sigma and x_0 of some groups."""
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.randn(groups * size, *shape, dtype=torch.float64, generator=generator)
    sigma = 0.1 + 0.8 * torch.rand(groups * size, dtype=torch.float64, generator=generator)
    noise = torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
    return add_noise(SCHEDULE, x_0, noise, sigma), sigma, x_0


def by_hand(x_t: Tensor, sigma: Tensor, x_0: Tensor, scores: Tensor, size: int) -> Tensor:
    """The definition, one sample at a time."""
    fields = []
    for i in range(len(x_0)):
        first = i // size * size
        own = [j for j in range(first, first + size) if not math.isnan(scores[j])]
        if math.isnan(scores[i]):
            fields.append(torch.zeros_like(x_0[i]))
            continue
        alpha = 1 - sigma[i]
        distances = torch.stack([(x_t[i] / alpha - x_0[j]).square().sum() for j in own])
        deviation = distances.std() if len(own) > 1 else torch.tensor(0.0)
        weights = torch.exp(-distances / max(2 * (sigma[i] / alpha) ** 2, deviation))
        weights = weights / weights.sum()
        mean_x = sum(w * x_0[j] for w, j in zip(weights, own, strict=True))
        mean_r = sum(w * scores[j] for w, j in zip(weights, own, strict=True))
        parts = (w * (scores[j] - mean_r) * (x_0[j] - mean_x) for w, j in zip(weights, own, strict=True))
        fields.append(sum(parts, torch.zeros_like(x_0[i])))
    return torch.stack(fields)


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, -1.0, 2.0, 0.1, 5.0, 4.0, 4.5, 7.0],
        [0.3, NAN, 2.0, 0.1, NAN, NAN, NAN, NAN],
        [0.3, NAN, NAN, NAN, 1.0, NAN, 4.0, 0.0],
    ],
)
def test_it_is_the_weighted_covariance(scores: list[float]) -> None:
    """With and without missing scores; a group of which nothing or one sample is left teaches nothing."""
    x_t, sigma, x_0 = example()
    given = torch.tensor(scores, dtype=torch.float64)
    field = group_covariance(SCHEDULE, x_t, sigma, x_0, given, 4)
    torch.testing.assert_close(field, by_hand(x_t, sigma, x_0, given, 4))
    assert field.shape == x_0.shape


def test_both_widths_are_used() -> None:
    """The example has samples on either side of the bound on the width, so the test above sees both."""
    x_t, sigma, x_0 = example()
    bayes = 2 * (sigma / (1 - sigma)).square()
    seen = x_t / (1 - sigma).reshape(-1, 1, 1)
    deviation = (seen.reshape(2, 4, 1, 6) - x_0.reshape(2, 1, 4, 6)).square().sum(3).std(2).flatten()
    assert bool((bayes > deviation).any())
    assert bool((bayes < deviation).any())


def test_what_it_does_not_depend_on() -> None:
    """The scores' level, the order within a group, other groups."""
    x_t, sigma, x_0 = example()
    scores = torch.arange(8.0, dtype=torch.float64).square()
    field = group_covariance(SCHEDULE, x_t, sigma, x_0, scores, 4)
    torch.testing.assert_close(group_covariance(SCHEDULE, x_t, sigma, x_0, scores + 100, 4), field)
    order = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])
    permuted = group_covariance(SCHEDULE, x_t[order], sigma[order], x_0[order], scores[order], 4)
    torch.testing.assert_close(permuted, field[order])
    alone = group_covariance(SCHEDULE, x_t[:4], sigma[:4], x_0[:4], scores[:4], 4)
    torch.testing.assert_close(alone, field[:4])
    torch.testing.assert_close(group_covariance(SCHEDULE, x_t, sigma, x_0, 3 * scores, 4), 3 * field)


def test_equal_scores_teach_nothing() -> None:
    """Exactly zero, also in float32 and for groups of one."""
    x_t, sigma, x_0 = (tensor.float() for tensor in example())
    assert not group_covariance(SCHEDULE, x_t, sigma, x_0, torch.zeros(8), 4).any()
    assert not group_covariance(SCHEDULE, x_t, sigma, x_0, torch.arange(8.0), 1).any()


def test_many_dimensions_do_not_silence_it() -> None:
    """Where Bayes' rule puts all weight on the sample itself, the bound on the width leaves the others some."""
    x_t, sigma, x_0 = example(shape=(64, 64))
    field = group_covariance(SCHEDULE, x_t, sigma, x_0, torch.arange(8.0, dtype=torch.float64), 4)
    assert (field.flatten(1).norm(dim=1) > 0.05 * x_0.flatten(1).norm(dim=1)).all()


def test_groups_must_divide() -> None:
    """Anything else would mix prompts."""
    x_t, sigma, x_0 = example()
    with pytest.raises(ValueError, match="8 samples do not divide into groups of 3"):
        group_covariance(SCHEDULE, x_t, sigma, x_0, torch.zeros(8), 3)
