"""A text length that a pipeline's call refuses is refused when the family is made, not after the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_calls import run_pipeline
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError
from rdm_sdk.families.load import load_family

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
UNLIMITED = ("PixArtSigmaPipeline", "SanaPipeline")
"""Pipelines whose calls take any length."""


@pytest.mark.parametrize("length", [-1, 5000])
@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
def test_a_length_beyond_the_familys_is_refused(kind: str, length: int, pipelines: dict[str, Any]) -> None:
    """In one line that names it; where there is no end, the pipeline's own call takes it too."""
    if length == 5000 and kind in UNLIMITED:
        family = load_family(pipelines[kind], torch.float32, max_sequence_length=length)
        call = family.inference_call(1) | {"height": 32, "width": 32, "output_type": "latent"}
        assert call["max_sequence_length"] == 5000
        run_pipeline(pipelines[kind], ["a fox"], **call)
        return
    with pytest.raises(ConfigError, match=f"^max_sequence_length={length} ") as caught:
        load_family(pipelines[kind], torch.float32, max_sequence_length=length)
    assert "\n" not in str(caught.value)


def test_the_longest_that_stable_diffusion_3_takes(pipelines: dict[str, Any]) -> None:
    """Its call refuses one more."""
    pipeline = pipelines["StableDiffusion3Pipeline"]
    assert load_family(pipeline, torch.float32, max_sequence_length=512).max_sequence_length == 512
    assert load_family(pipeline, torch.float32, max_sequence_length=0).max_sequence_length == 0
    with pytest.raises(ConfigError, match="max_sequence_length=513 is not between 0 and 512"):
        load_family(pipeline, torch.float32, max_sequence_length=513)
    with pytest.raises(ValueError, match="512"):
        run_pipeline(pipeline, ["a fox"], height=32, width=32, num_inference_steps=1, max_sequence_length=513)
