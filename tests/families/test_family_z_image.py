"""Z-Image's own: lists of samples, time and flow the other way, text behind the image, static and dynamic shift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_asserts import assert_guides_as_the_pipeline, assert_recomputed_gradients_are_equal
from pipeline_calls import PROMPTS, assert_same_inputs, calls_of, run_pipeline
from tiny_pipelines import tiny_z_image
from torch import Tensor

from rdm_sdk import ConfigError
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = {"height": 32, "width": 64}


@pytest.fixture
def pipeline() -> Any:
    made = tiny_z_image()
    made.set_progress_bar_config(disable=True)
    return made


def test_guidance_is_the_pipelines(pipeline: Any) -> None:
    """Its scale of 2 is ours of 3."""
    assert_guides_as_the_pipeline(load_family(pipeline, torch.float32), 3.0, guidance_scale=2.0)


@pytest.mark.parametrize("length", [None, 24])
def test_texts_of_several_lengths_reach_the_backbone_as_from_the_pipeline(pipeline: Any, length: int | None) -> None:
    """Each in its own length, cut where it is too long; the caller's prompts stay as they are."""
    family = load_family(pipeline, torch.float32, max_sequence_length=length)
    prompts = list(PROMPTS)
    encoded: dict[str, Tensor] = {}
    assert len(calls_of(pipeline, "text_encoder", lambda: encoded.update(family.encode_prompts(prompts)))) == 1
    assert prompts == PROMPTS
    assert {name: tensor.shape[:2] for name, tensor in encoded.items()} == dict.fromkeys(encoded, (2, length or 512))
    x_t = torch.randn(2, *family.latent_shape(**SIZE), generator=torch.Generator().manual_seed(0))
    call = family.inference_call(1) | {"latents": x_t, "output_type": "latent", **SIZE}
    (theirs,) = calls_of(pipeline, "transformer", lambda: run_pipeline(pipeline, PROMPTS, **call))
    assert len({len(text) for text in theirs["cap_feats"]}) == (2 if length is None else 1)
    (ours,) = calls_of(
        pipeline, "transformer", lambda: family.predict(family.roles, TEACHER, x_t, torch.ones(2), encoded)
    )
    assert_same_inputs(ours, theirs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (64, 128)])
def test_the_students_grid_is_the_bases(pipeline: Any, dynamic: bool, size: tuple[int, int]) -> None:
    """With the published bases' static shift as with one that grows with the image."""
    settings = {"use_dynamic_shifting": dynamic, "base_image_seq_len": 16, "max_image_seq_len": 512}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
    family = load_family(pipeline, torch.float32)
    run_pipeline(pipeline, ["a fox"], height=size[0], width=size[1], **family.inference_call(4))
    shift = family.base_shift(family.latent_shape(*size))
    assert family.student_sigmas(4, shift) == pytest.approx(pipeline.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert family.student_sigmas(1, shift) == [1.0]


def test_the_default_size_is_the_calls(pipeline: Any) -> None:
    family = load_family(pipeline, torch.float32)

    def stop(_count: int, _channels: int, height: int, width: int, *_: Any) -> None:
        assert family.default_size == (height, width)
        raise InterruptedError

    pipeline.prepare_latents = stop
    with pytest.raises(InterruptedError):
        run_pipeline(pipeline, ["a fox"], **family.inference_call(1))
    with pytest.raises(ConfigError, match="positive multiples of 8"):
        family.latent_shape(36, 32)


def test_features_are_the_images_alone(pipeline: Any) -> None:
    """16 tokens, which the transformer pads to 32 and joins with the text's 32 or more; padding says nothing of x_t."""
    family = load_family(pipeline, torch.float32)
    x_t = torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    assert family.feature_block() is pipeline.transformer.layers[0]
    extract = family.features(family.roles, TEACHER, family.condition(PROMPTS))
    with torch.no_grad():
        features = extract(x_t, torch.tensor([0.5, 0.6]))
        assert features.shape == (2, 16, family.feature_width)
        # A patch's own token answers most to it: the last patch's is the last.
        x_t[:, :, -2:, -2:] += 1
        moved = (extract(x_t, torch.tensor([0.5, 0.6])) - features).norm(dim=-1)
    assert moved.argmax(1).tolist() == [15, 15]


@pytest.mark.parametrize("other", ["teacher", "fake"])
def test_gradients_flow_through_lists_and_recomputed_blocks(other: str) -> None:
    assert_recomputed_gradients_are_equal(tiny_z_image, other)


@pytest.mark.parametrize("length", [0, 993])
def test_lengths_that_the_transformer_has_no_places_for(pipeline: Any, length: int) -> None:
    """992 tokens of text and the image behind them are the most for 1,024 places."""
    with pytest.raises(ConfigError, match=f"max_sequence_length={length} is not between 1 and 992"):
        load_family(pipeline, torch.float32, max_sequence_length=length)


def test_the_longest_text_still_has_a_place(pipeline: Any) -> None:
    family = load_family(pipeline, torch.float32, max_sequence_length=992)
    condition = family.condition(["x" * 1000])
    assert condition["encoder_hidden_states_mask"].all()
    x_t = torch.randn(1, *family.latent_shape(32, 32))
    with torch.no_grad():
        assert family.predict(family.roles, TEACHER, x_t, torch.ones(1), condition).isfinite().all()
