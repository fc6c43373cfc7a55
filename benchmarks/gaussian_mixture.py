"""A teacher in closed form, a Gaussian mixture per prompt, and how far samples are from it. For `mixture.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rdm_sdk.method.noise import FlowSchedule

DIMENSIONS, PROMPTS, MODES = 8, 4, 2
SCHEDULE = FlowSchedule()
NEIGHBOR = 4


@dataclass(frozen=True)
class Teacher:
    """A mixture of K isotropic Gaussians for each of P prompts, in D dimensions.

    Methods take points `[N, D]`, their prompts (int64 `[N]`) and noise levels `[N]`; level 0 is the data.
    """

    weights: Tensor  # [P, K], each row summing to 1
    means: Tensor  # [P, K, D]
    stds: Tensor  # [P, K]

    def sample(self, prompts: Tensor) -> Tensor:
        """Draw clean points `[N, D]` for prompts `[N]`."""
        mode = torch.multinomial(self.weights[prompts], 1)[:, 0]
        noise = torch.randn(len(prompts), self.means.shape[2])
        return self.means[prompts, mode] + self.stds[prompts, mode, None] * noise

    def _joint(self, x_t: Tensor, prompts: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log(weight_k N(x_t; noised mode k)) and variances `[N, K]`, and residuals `[N, K, D]`."""
        alpha = SCHEDULE.alpha(sigma)[:, None]
        variance = (alpha * self.stds[prompts]).square() + sigma[:, None].square()
        residual = x_t[:, None] - alpha[:, :, None] * self.means[prompts]
        exponent = residual.square().sum(2) / variance + x_t.shape[1] * (2 * torch.pi * variance).log()
        return self.weights[prompts].log() - 0.5 * exponent, variance, residual

    def log_prob(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """Return the log-density of clean points, `[N]`."""
        return self._joint(x_0, prompts, torch.zeros(len(x_0)))[0].logsumexp(1)

    def denoise(self, x_t: Tensor, prompts: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior mean E[x_0 | x_t] `[N, D]`."""
        joint, variance, residual = self._joint(x_t, prompts, sigma)
        gain = SCHEDULE.alpha(sigma)[:, None] * self.stds[prompts].square() / variance
        return (joint.softmax(1)[:, :, None] * (self.means[prompts] + gain[:, :, None] * residual)).sum(1)

    def mode_masses(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """Return the share of each prompt's points in each mode `[P, K]`, by posterior responsibility."""
        responsibility = self._joint(x_0, prompts, torch.zeros(len(x_0)))[0].softmax(1)
        return torch.stack([responsibility[prompts == p].mean(0) for p in range(len(self.weights))])


@cache
def make_teacher() -> Teacher:
    """Return the study's teacher, the same for every run: uneven masses and widths, about unit variance."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(PROMPTS, MODES, DIMENSIONS, generator=generator)
    weights = torch.tensor([0.7, 0.3]).expand(PROMPTS, MODES)
    stds = torch.tensor([0.3, 0.4, 0.5, 0.7])[:, None].expand(PROMPTS, MODES)  # prompts differ in their scale
    return Teacher(weights, means, stds)


def divergence(x_0: Tensor, prompts: Tensor) -> float:
    """Estimate KL(student || teacher) in nats from samples `[N, D]` of prompts `[N]`, averaged over prompts.

    The cross-entropy is the mean of the exact teacher log-density; the entropy is the k-nearest-neighbor estimate of
    Kozachenko and Leonenko (1987) in the form of Kraskov et al. (arXiv cond-mat/0305641, eq. 20), with k = `NEIGHBOR`:
    H = psi(N) - psi(k) + log V_D + D mean log rho_k. It is the estimator of Wang, Kulkarni and Verdu (2009) with the
    second density known. Its bias at zero divergence is measured by `floor()` on teacher samples.
    """
    volume = 0.5 * DIMENSIONS * math.log(math.pi) - math.lgamma(0.5 * DIMENSIONS + 1)
    total = 0.0
    for p in range(PROMPTS):
        points = x_0[prompts == p].double()
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        radius = distance.topk(NEIGHBOR + 1, largest=False).values[:, -1].clamp_min(1e-12)  # the first is the point
        count, k = (torch.tensor(float(n), dtype=torch.float64) for n in (len(points), NEIGHBOR))
        entropy = count.digamma() - k.digamma() + volume + DIMENSIONS * radius.log().mean()
        cross = -make_teacher().log_prob(points.float(), torch.full((len(points),), p)).double().mean()
        total += float(cross - entropy) / PROMPTS
    return total


def quality(x_0: Tensor, prompts: Tensor) -> dict[str, float]:
    """Return the estimated KL and the total variation between the mode masses of samples and teacher."""
    teacher = make_teacher()
    missed = 0.5 * (teacher.mode_masses(x_0, prompts) - teacher.weights).abs().sum(1).mean()
    return {"kl": divergence(x_0, prompts), "mode_tv": float(missed)}


@cache
def floor(seed: int, per_prompt: int) -> dict[str, float]:
    """Return the `quality` of the teacher's own samples."""
    torch.manual_seed(seed)
    prompts = torch.arange(PROMPTS).repeat_interleave(per_prompt)
    return quality(make_teacher().sample(prompts), prompts)
