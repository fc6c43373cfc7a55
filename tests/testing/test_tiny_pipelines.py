"""The tiny pipelines run their families' plain calls, and what they show depends on the prompt and on nothing else."""

import time

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY_PIPELINES, tiny_flux, tiny_sd

# Two of diffusers' schedulers hand tensors to numpy in a way that newer versions of numpy warn about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GUIDANCE = {
    # Its guidance_scale is for models with that scale embedded, which no published Qwen-Image is.
    "QwenImagePipeline": {"true_cfg_scale": 3.0, "negative_prompt": " "},
    # Otherwise they make images of 512 and 256 pixels and scale them down; PixArt also looks for beautifulsoup4.
    "SanaPipeline": {"guidance_scale": 3.0, "use_resolution_binning": False},
    "PixArtSigmaPipeline": {"guidance_scale": 3.0, "use_resolution_binning": False, "clean_caption": False},
}
"""Arguments with which a family's call guides, where they are not `guidance_scale` alone."""


@pytest.fixture(params=TINY_PIPELINES)
def name(request) -> str:
    """Each family, by the name of its pipeline's class."""
    return request.param


def noise(seed: int) -> torch.Generator:
    """Return a generator in the state of its seed."""
    return torch.Generator().manual_seed(seed)


def images(pipeline, prompt="a prompt", seed=0, **settings) -> torch.Tensor:
    """Return the images `[N, 3, 32, 32]` of two steps."""
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "generator": noise(seed)}
    guidance = GUIDANCE.get(type(pipeline).__name__, {"guidance_scale": 3.0})
    return pipeline(prompt=prompt, **(defaults | guidance | settings)).images


def test_plain_call(name):
    """Images are finite and not flat; the same for the same seeds, others for another prompt, noise or weights."""
    pipeline = TINY_PIPELINES[name]()
    assert type(pipeline).__name__ == name
    shown = images(pipeline)
    assert shown.shape == (1, 3, 32, 32)
    assert shown.isfinite().all()
    assert shown.std() > 0.1
    assert torch.equal(shown, images(pipeline))
    assert torch.equal(shown, images(TINY_PIPELINES[name](seed=0)))
    others = [images(pipeline, "another cat"), images(pipeline, seed=1), images(TINY_PIPELINES[name](seed=1))]
    assert all((shown - other).abs().mean() > 0.01 for other in others)


def test_prompts_of_different_lengths(name):
    """In a batch, a prompt shows what it shows alone: padding to the longest one changes nothing."""
    pipeline = TINY_PIPELINES[name]()
    prompts = ["a cat", "a long prompt"]
    extra = {"negative_prompt": [" ", " "]} if name == "QwenImagePipeline" else {}
    # A copy of the prompts, as Z-Image's pipeline writes its template into the list that it is given.
    together = images(pipeline, list(prompts), generator=[noise(0), noise(1)], **extra)
    alone = [images(pipeline, prompt, seed) for seed, prompt in enumerate(prompts)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_round_trip(name, tmp_path):
    """A saved pipeline, tokenizers included, is read back and shows the same image."""
    pipeline = TINY_PIPELINES[name]()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline)
    assert torch.allclose(images(loaded), images(pipeline), atol=1e-6)


def test_guidance_counts(name):
    """Guided images are others than unguided ones."""
    pipeline = TINY_PIPELINES[name]()
    scale = "true_cfg_scale" if name == "QwenImagePipeline" else "guidance_scale"
    assert (images(pipeline) - images(pipeline, **{scale: 1.0})).abs().mean() > 0.001


def test_variants():
    """FLUX.1 [schnell] ignores the guidance scale; a Stable Diffusion of v makes other images of the same weights."""
    schnell = tiny_flux(guidance_embeds=False)
    assert torch.equal(images(schnell), images(schnell, guidance_scale=1.0))
    assert not torch.equal(images(tiny_sd()), images(tiny_sd(prediction_type="v_prediction")))


def test_template_of_qwen_image():
    """The tokens that the pipeline cuts off are its template's, to the last one, as with the published tokenizer."""
    pipeline = TINY_PIPELINES["QwenImagePipeline"]()
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx


def test_building_is_quick_and_leaves_the_global_state_alone():
    """All nine take less than a second; the bound is for busy machines."""
    before, start = torch.get_rng_state(), time.perf_counter()
    for build in TINY_PIPELINES.values():
        build()
    assert time.perf_counter() - start < 15
    assert torch.equal(torch.get_rng_state(), before)
