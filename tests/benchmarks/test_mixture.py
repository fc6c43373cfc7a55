"""The benchmark in closed form: its teacher, its ruler, and that the package's step is what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gaussian_mixture
import mixture
import mixture_cells
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rdm_sdk import RewardError

SIZE = mixture.Size(teacher_forwards=20 * 64, samples_per_prompt=200, pretraining=150)


def cell(name: str) -> Any:
    return next(own for own in mixture_cells.all_cells() if own.name == name)


def test_the_teacher_denoises_as_its_density_says() -> None:
    """Tweedie's formula on PyTorch's own mixture: alpha D(x_t) = x_t + sigma^2 grad log p(x_t)."""
    teacher = gaussian_mixture.make_teacher()
    prompts, sigma = torch.arange(4).repeat(8), torch.linspace(0.1, 0.9, 32)
    x_t = torch.randn(32, gaussian_mixture.DIMENSIONS, requires_grad=True)
    alpha = 1 - sigma
    spread = ((alpha[:, None] * teacher.stds[prompts]) ** 2 + sigma[:, None] ** 2).sqrt()
    modes = Normal(alpha[:, None, None] * teacher.means[prompts], spread[:, :, None])
    density = MixtureSameFamily(Categorical(teacher.weights[prompts]), Independent(modes, 1))
    (score,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    expected = (x_t + sigma[:, None] ** 2 * score) / alpha[:, None]
    torch.testing.assert_close(teacher.denoise(x_t, prompts, sigma), expected.detach(), rtol=1e-3, atol=1e-4)


def test_the_ruler_measures_a_known_divergence() -> None:
    """Near 0 for the teacher's own samples; for samples of one Gaussian, its known KL from a shifted one more."""
    assert abs(gaussian_mixture.floor(0, 1000)["kl"]) < 0.1
    teacher, prompts = gaussian_mixture.make_teacher(), torch.arange(4).repeat_interleave(1000)
    samples = teacher.means[prompts, 0] + teacher.stds[prompts, 0, None] * torch.randn(4000, 8)
    # One mode of two that hardly overlap: the other's mass is missing.
    expected = -teacher.weights[0, 0].log().item()
    found = gaussian_mixture.quality(samples, prompts)
    assert found["kl"] == pytest.approx(expected, abs=0.15)
    assert found["mode_tv"] == pytest.approx(0.3, abs=0.02)


def test_a_run_learns_and_counts_its_costs() -> None:
    """The KL falls; the teacher is asked once per sample, the student four times for the rollout and once to learn."""
    row = mixture.run_cell(cell("dmd2"), 0, SIZE)
    assert row["stopped"] == ""
    assert row["kl"] < row["start_kl"] - 0.2
    assert row["teacher_forwards"] == row["rollouts"] == SIZE.teacher_forwards
    assert row["student_forwards"] == 5 * SIZE.teacher_forwards
    assert row["fake_forwards"] == 6 * SIZE.teacher_forwards
    assert row["critic_steps"] == 5 * 20
    assert [point["student_steps"] for point in row["curve"]] == [0, 4, 8, 12, 16, 20]


def test_a_rollout_serves_several_updates() -> None:
    """Four uses need a quarter of the rollouts, and say how much of them still counts."""
    row = mixture.run_cell(cell("stratified_uses4"), 0, SIZE)
    assert row["rollouts"] == SIZE.teacher_forwards / 4
    assert 0.5 <= row["effective_share"] <= 1


def test_a_run_that_breaks_off_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student whose loss is not finite: the row says why, and no KL is made up."""
    broken = mixture_cells.DMD2.but("broken", learning_rate=1e30)
    row = mixture.run_cell(broken, 0, SIZE)
    assert "not finite" in str(row["stopped"]) or "nan" in str(row["stopped"])
    assert row["kl"] is None
    assert row["mode_tv"] is None


def test_steps_can_be_shared_where_noise_levels_are_not() -> None:
    """`gndm_one_step`: a group trains at one step of the grid, at noise levels that are spread."""
    models = mixture.MixtureModels(mixture.Network())
    run = mixture.Run(cell("gndm_one_step_lr0.008"), models, 10)
    run.train_step(0)
    (experience,) = run.step.rollouts.experiences
    groups = experience.steps.reshape(-1, 8)
    assert (groups == groups[:, :1]).all()
    assert groups.unique().numel() > 1
    sigma = run.step.judge.context(experience.condition, experience.steps).draw_sigma(64, 8, mixture.CPU)
    assert sigma.reshape(-1, 8).std(1).min() > 0.1


def test_points_are_no_images() -> None:
    """A reward that wants pictures hears that there are none."""
    with pytest.raises(RewardError, match="no images"):
        mixture.MixtureModels(mixture.Network()).to_images(torch.zeros(1, 8))


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call finds the run done; a row of other settings, as older versions wrote, does not count."""
    command = ["mixture.py", "--smoke", "--only", "dmd2", "--seeds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    path = tmp_path / "mixture.jsonl"
    older = '{"name": "dmd2", "seed": 3, "budget": 768, "kl": 9.0}\n'
    path.write_text(older, encoding="utf-8")
    mixture.main()
    rows = mixture.read_rows(path)
    assert len(rows) == 2
    assert rows[1]["settings"] == cell("dmd2").content
    mixture.main()
    assert mixture.read_rows(path) == rows
