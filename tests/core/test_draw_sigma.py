"""Noise levels are drawn once per group, uniformly over the range, stratified over the groups."""

import pytest
import torch

from rdm_sdk.core.noise import FlowSchedule, add_noise, draw_sigma

CPU = torch.device("cpu")


def test_one_level_per_group():
    """All samples of a group share its level, groups adjacent; different groups differ."""
    torch.manual_seed(0)
    sigma = draw_sigma(5, 3, 0.1, 0.9, CPU)
    assert sigma.shape == (15,)
    levels = sigma.reshape(5, 3)
    assert (levels == levels[:, :1]).all()
    assert len(levels[:, 0].unique()) == 5


def test_levels_are_stratified():
    """Exactly one level falls into each of `num_groups` equal intervals of [low, high)."""
    torch.manual_seed(1)
    for _ in range(20):
        strata = (draw_sigma(8, 1, 0.2, 0.6, CPU) - 0.2) / 0.4 * 8
        assert strata.sort().values.floor().tolist() == list(range(8))


def test_each_group_is_uniform():
    """Every group's level is uniform over the range, wherever the group stands in the batch."""
    torch.manual_seed(2)
    draws = torch.stack([draw_sigma(4, 1, 0.2, 0.8, CPU) for _ in range(3000)])
    quantiles = draws.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), dim=0)
    expected = 0.2 + 0.6 * torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(quantiles, expected[:, None].expand(5, 4), rtol=0, atol=0.03)


def test_a_single_group_covers_the_range():
    """With one group there is one stratum: the whole range."""
    torch.manual_seed(3)
    draws = torch.cat([draw_sigma(1, 1, 0.02, 0.98, CPU) for _ in range(500)])
    assert 0.02 <= draws.min() < 0.05
    assert 0.95 < draws.max() < 0.98


def test_a_level_for_each_sample_is_required():
    """A noise level that would broadcast by accident is an error."""
    x_0 = torch.zeros(3, 2)
    for sigma in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((3, 1), 0.5)):
        with pytest.raises(ValueError, match="one value per sample"):
            add_noise(FlowSchedule(), x_0, x_0, sigma)
