"""Gaussian mixtures, whose noised densities, scores and optimal denoisers are all closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_sdk.method.noise import NoiseSchedule
from rdm_sdk.types import Denoiser


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of K axis-aligned Gaussians in D dimensions; one component makes it a plain Gaussian.

    Every method takes a batch of points `[N, D]` with one noise level each, `sigma` `[N]`; `sigma = 0` is the clean
    distribution.
    """

    weights: Tensor
    """`[K]`, summing to 1."""
    means: Tensor
    """`[K, D]`."""
    stds: Tensor
    """`[K, D]`."""

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw clean points `[num, D]`, differentiable in `means` and `stds` (the components are drawn first)."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        eps = torch.randn(num, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return self.means[component] + self.stds[component] * eps

    def _components(self, schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha `[N, 1, 1]`, residuals and variances `[N, K, D]` of the noised components."""
        alpha = schedule.alpha(sigma)[:, None, None]
        variance = alpha.square() * self.stds.square() + sigma[:, None, None].square()
        return alpha, x_t[:, None] - alpha * self.means, variance

    def _joint(self, residual: Tensor, variance: Tensor) -> Tensor:
        """Return log(weight_k N(x_t; component k)) `[N, K]`."""
        log_density = -0.5 * (residual.square() / variance + variance.log() + torch.log(torch.tensor(2 * torch.pi)))
        return self.weights.log() + log_density.sum(-1)

    def log_prob(self, schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(x_t) `[N]`."""
        _, residual, variance = self._components(schedule, x_t, sigma)
        return self._joint(residual, variance).logsumexp(1)

    def score(self, schedule: NoiseSchedule, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return grad log p(x_t) `[N, D]`."""
        _, residual, variance = self._components(schedule, x_t, sigma)
        responsibility = self._joint(residual, variance).softmax(1)[:, :, None]
        return -(responsibility * residual / variance).sum(1)

    def denoiser(self, schedule: NoiseSchedule) -> Denoiser:
        """Return the optimal denoiser, the posterior mean E[x_0 | x_t]; needs no sigma > 0."""

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            alpha, residual, variance = self._components(schedule, x_t, sigma)
            responsibility = self._joint(residual, variance).softmax(1)[:, :, None]
            posterior_mean = self.means + alpha * self.stds.square() / variance * residual
            return (responsibility * posterior_mean).sum(1)

        return denoise
