"""The families that every default run tries where the contract of all of them covers the same."""

from __future__ import annotations

import pytest
from tiny_pipelines import TINY_PIPELINES

USUAL = ("FluxPipeline", "SanaPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline")
"""A rectified flow with guidance embedded, another latent space, the digits' family, a UNet."""
usual_families = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow) for kind in sorted(TINY_PIPELINES)]
)
"""All families; those beside the usual ones are slow tests."""
