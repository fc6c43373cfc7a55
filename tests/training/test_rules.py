"""Rules of single settings: choices are those of the annotations, also in a subclass, whose names are checked too."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
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
        ({"max_steps": 0}, "max_steps=0 .*at least 1, or -1 to go by num_train_epochs"),
        ({"max_steps": -7}, "max_steps=-7 .*at least 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 .*positive"),
        ({"reward_device": "cudda"}, "reward_device='cudda' .*a device such as"),
        ({"log_images": -1}, "log_images=-1 .*0 or more"),
        ({"log_images": 2, "log_images_limit": 1}, "log_images_limit 2 or more"),
        ({"log_images_limit": 5}, "log_images above 0"),
        ({"log_images_filter": "jpeg >= 0"}, "log_images above 0, or log_images_filter None"),
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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": "1e-4"}, 1e-4),  # as YAML reads 1e-4
        ({"critic_learning_rate": "2e-4"}, 2e-4),
        ({"max_steps": "20"}, 20),
        ({"max_steps": 20.0}, 20),
        ({"logging_steps": 5}, 5),
        ({"num_iterations": np.int64(2)}, 2),
        ({"vae_tiling": "false"}, False),  # a text that is not empty is true to Python
        ({"reward_weights": ["1e-1", 2]}, [0.1, 2.0]),
        ({"shift": None}, None),
    ],
)
def test_a_value_that_can_mean_one_thing_gets_its_type(
    settings: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    """From a YAML file that was read by hand, or from NumPy."""
    (name,) = settings
    got = getattr(RDMConfig(output_dir=str(tmp_path), **settings), name)
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": "fast"}, "learning_rate='fast' cannot be used; it must be a number"),
        ({"resolutions": "32x32"}, "resolutions='32x32' cannot be used; it must be a list of texts, or None"),
        ({"reward_weights": 0.5}, "reward_weights=0.5 .*a list of numbers, or None"),
        ({"num_generations": True}, "num_generations=True .*a whole number"),
        ({"num_generations": 2.5}, "num_generations=2.5 .*a whole number"),
        ({"bf16": "perhaps"}, "bf16='perhaps' .*true or false"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 .*at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 .*at least 1"),
        ({"critic_learning_rate": -1e-4}, "critic_learning_rate=-0.0001 .*0 or more"),
        ({"save_steps": None}, "save_steps=None .*a number"),
    ],
)
def test_a_value_of_another_type_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A text where a list is meant is not taken letter by letter, and true is no number."""
    with pytest.raises(ConfigError, match=words):
        RDMConfig(output_dir=str(tmp_path), **settings)
