"""Rules of single settings: choices are those of the annotations, also in a subclass, whose names are checked too."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from rdm_sdk import ConfigError, RDMConfig

CHOICES = {
    name: get_args(hint)
    for name, hint in get_type_hints(RDMConfig).items()
    if get_origin(hint) is Literal and not hasattr(TrainingArguments, name)
}


@dataclass
class MoreConfig(RDMConfig):
    """What someone adds settings in."""

    color: Literal["red", "green"] = "red"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_does_not_exist_is_refused(name: str, tmp_path: Path) -> None:
    """Every setting with choices is checked, and the message lists them."""
    with pytest.raises(ConfigError, match=f"{name}='no such' .*{', '.join(CHOICES[name])}"):
        RDMConfig(output_dir=str(tmp_path), **{name: "no such"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"color": "gren"}, "color='gren' .*one of red, green.*Did you mean 'green'"),
        ({"colour": "red"}, "unknown setting 'colour'. Did you mean 'color'"),
        ({"num_generation": 4}, "unknown setting 'num_generation'. Did you mean 'num_generations'"),
    ],
)
def test_a_subclass_is_checked_too(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Its own choices and names as well as the inherited ones."""
    with pytest.raises(ConfigError, match=words):
        MoreConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward_batch_size": 0}, "reward_batch_size=0 .*at least 1, or None"),
        ({"reward_device": "cudda"}, "reward_device='cudda' .*a device such as"),
        ({"log_images": -1}, "log_images=-1 .*0 or more"),
        ({"importance_sampling_cap": 0.5}, r"importance_sampling_cap=0\.5 .*at least 1"),
        ({"min_effective_sample_size": 1.5}, r"min_effective_sample_size=1\.5 .*a share of the samples"),
        ({"num_iterations": 0, "shift": 0.0}, "num_iterations=0"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    """The first rule that is broken is the one named."""
    with pytest.raises(ConfigError, match=words):
        RDMConfig(output_dir=str(tmp_path), **settings)


def test_the_constructor_is_shown_with_its_settings(tmp_path: Path) -> None:
    """What refuses unknown settings hides no signature, and argument parsers make a config as ever."""
    assert {"output_dir", "num_generations"} <= inspect.signature(RDMConfig).parameters.keys()
    arguments = ["--output_dir", str(tmp_path), "--num_generations", "4", "--sampler", "ode", "--use_cpu", "True"]
    (config,) = HfArgumentParser(RDMConfig).parse_args_into_dataclasses(arguments)
    assert (config.num_generations, config.sampler) == (4, "ode")
