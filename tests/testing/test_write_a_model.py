"""The page for authors of families: its examples keep the contract on the pipelines that they are for."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import ConfigError, ModelError, RDMConfig, RDMTrainer
from rdm_sdk.families.sd3 import SD3Family
from rdm_sdk.testing import check_model

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PAGE = Path(__file__).parents[2] / "docs" / "write-a-model.md"
OPTIONAL = {"example_encoding": "the page leaves it out"}
LEFT_OUT = {"features", "guides_as_the_pipeline"}  # without a feature block; without guidance
EXAMPLES: dict[str, Any] = {
    "PackedFamily": partial(TINY_PIPELINES["FluxPipeline"], guidance_embeds=False),
    "MaskedFamily": TINY_PIPELINES["PixArtSigmaPipeline"],
    "UNetFamily": TINY_PIPELINES["StableDiffusionPipeline"],
}


def family_of_the_page(name: str) -> Any:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (code,) = [block for block in blocks if f"class {name}(" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    return names[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_keeps_the_contract(name: str) -> None:
    """All but what it leaves out for brevity."""
    family = family_of_the_page(name)
    results = check_model(lambda: family(EXAMPLES[name]()), expected_failures={})
    assert {result.name for result in results if result.status != "passed"} <= LEFT_OUT | OPTIONAL.keys()


def test_the_unet_takes_no_length() -> None:
    with pytest.raises(ConfigError, match="max_sequence_length=5: CLIP's number of tokens is fixed"):
        family_of_the_page("UNetFamily")(EXAMPLES["UNetFamily"](), 5)


@pytest.mark.parametrize(
    "member",
    ["timesteps(sigma)", "call_length = 0", "save_lora(", "loading_code", "no_checkpointing", "expected_failures"],
)
def test_the_page_has_what_authors_looked_for(member: str) -> None:
    assert member in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("setting", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_family_can_say_that_its_blocks_must_not_be_run_again(tmp_path: Path, setting: str) -> None:
    """The setting is refused with its reason when the trainer is built, and the kit skips the check."""

    class Once(SD3Family):
        no_checkpointing = "they keep a state from call to call"

    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "guidance_scale": 1.0,
    }
    family = Once(TINY_PIPELINES["StableDiffusion3Pipeline"]())
    words = (
        "activation_checkpointing=True: the blocks of SD3Transformer2DModel must not be run again: they keep a state"
    )
    with pytest.raises(ModelError, match=words):
        RDMTrainer(family, "dm", RDMConfig(**settings, **{setting: True}), ["a fox"])
    family = Once(TINY_PIPELINES["StableDiffusion3Pipeline"]())
    RDMTrainer(family, "dm", RDMConfig(**settings), ["a fox"])
    with pytest.raises(ModelError, match=words):
        family.roles.gradient_checkpointing_enable()


def test_a_network_that_cannot_is_refused_at_construction(tmp_path: Path) -> None:
    family = SD3Family(TINY_PIPELINES["StableDiffusion3Pipeline"]())
    family.backbone._supports_gradient_checkpointing = False
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "guidance_scale": 1.0,
    }
    with pytest.raises(ModelError, match="SD3Transformer2DModel does not support gradient checkpointing; leave it off"):
        RDMTrainer(family, "dm", RDMConfig(**settings, activation_checkpointing=True), ["a fox"])
