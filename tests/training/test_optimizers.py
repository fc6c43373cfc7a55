"""The settings' rates and options in a run that goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rdm_sdk import RDMConfig
from rdm_sdk.training.optimizers import restart_rates


def test_a_changed_rate_goes_on_where_the_schedule_stands(
    small_config: Callable[..., RDMConfig], tmp_path: Path
) -> None:
    """Rates are those of the settings at the step reached, per group; decay and betas are the settings' too."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (1e-3, 1e-2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5, betas=(0.5, 0.6))
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    args = small_config(tmp_path, learning_rate=4e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9)
    restart_rates(args, optimizer, schedule, [1.0, 10.0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-3 * 0.7, 4e-2 * 0.7])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), (0.8, 0.9)]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-3 * 0.6, 4e-2 * 0.6])
