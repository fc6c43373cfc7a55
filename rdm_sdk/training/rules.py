"""What settings must be: a rule for each, which the page of all settings prints, and what must fit together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter
from transformers import IntervalStrategy, SchedulerType, TrainingArguments

from rdm_sdk.errors import ConfigError, nearest


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test; `choices` are all values there are, where they can be listed."""

    wanted: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    enum: str = ""
    """Where the choices are another library's, which may have more in another version."""


def _or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.wanted}, or None", lambda value: value is None or rule.holds(value))


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


_AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
_AT_LEAST_0 = Rule("0 or more", lambda value: value >= 0)
_POSITIVE = Rule("positive", lambda value: value > 0)
_BELOW_1 = Rule("in [0, 1)", lambda value: 0 <= value < 1)
_SCHEDULES = tuple(kind.value for kind in SchedulerType)

# In the order in which they are checked. A key may name several settings, whose values then must fit together.
_RULES = {
    **dict.fromkeys(
        (
            *("num_generations", "num_inference_steps", "num_iterations", "per_device_train_batch_size"),
            *("per_device_eval_batch_size", "gradient_accumulation_steps"),
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), _AT_LEAST_0),
    # Trainer takes a step for 0, and goes by epochs for all that is below.
    "max_steps": Rule("at least 1, or -1 to go by num_train_epochs", lambda steps: steps >= 1 or steps == -1),
    "num_train_epochs": _POSITIVE,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_1),
    "seed": Rule("a whole number from 0 to 2^32 - 1", lambda seed: 0 <= seed < 2**32),
    "reward_batch_size": _or_none(_AT_LEAST_1),
    "reward_timeout": _or_none(_POSITIVE),
    "reward_device": Rule("a device such as 'cpu' or 'cuda:1'", lambda device: device is None or _is_device(device)),
    **dict.fromkeys(("critic_steps", "log_images", "critic_max_grad_norm"), _AT_LEAST_0),
    "log_images, log_images_limit": Rule(
        "log_images above 0 and log_images_limit 2 or more, or log_images_limit None",
        lambda given: given[1] is None or (given[0] > 0 and given[1] >= 2),
    ),
    "log_images, log_images_filter": Rule(
        "log_images above 0, or log_images_filter None", lambda given: given[1] is None or given[0] > 0
    ),
    "min_time, max_time": Rule("0 <= min_time < max_time < 1", lambda times: 0 <= times[0] < times[1] < 1),
    **dict.fromkeys(("critic_learning_rate", "critic_weight_decay"), _or_none(_AT_LEAST_0)),
    **dict.fromkeys(("critic_adam_beta1", "critic_adam_beta2"), _or_none(_BELOW_1)),
    "critic_lr_scheduler_type": Rule(
        f"one of {', '.join(_SCHEDULES)}",
        lambda kind: kind is None or kind in _SCHEDULES,
        _SCHEDULES,
        enum="transformers.SchedulerType",
    ),
    "ema_decay": _BELOW_1,
    "epsilon": _or_none(_POSITIVE),
    "importance_sampling_cap": _AT_LEAST_1,
    "min_effective_sample_size": Rule("a share of the samples, in [0, 1]", lambda share: 0 <= share <= 1),
    "guidance_scale": Rule("0 or more (1 is no guidance)", lambda scale: scale >= 0),
    "shift": _or_none(_POSITIVE),
    "torch_compile_mode": _or_none(
        _one_of(("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
    ),
}


def rules_of(config: type[TrainingArguments]) -> dict[str, Rule]:
    """Return the rules of a class of settings: the ranges, then the choices, as its `Literal` annotations list them."""
    inherited = TrainingArguments.__dataclass_fields__
    choices = {
        name: _one_of(get_args(hint))
        for name, hint in get_type_hints(config).items()
        if get_origin(hint) is Literal and name not in inherited
    }
    return _RULES | choices


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", list[str]: "a list of texts"}
_PLAIN |= {list[float]: "a list of numbers"}


@cache
def _plain_types(config: type) -> dict[str, tuple[TypeAdapter[Any], str]]:
    """Return what reads every setting that is a number, a truth value or a list, and what that is in words."""
    hints = get_type_hints(config)
    found: dict[str, tuple[TypeAdapter[Any], str]] = {}
    for field in fields(config):
        hint = hints[field.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if field.init and all(kind in _PLAIN or kind is type(None) for kind in kinds):
            wanted = [_PLAIN[kind] for kind in kinds if kind in _PLAIN]
            # A whole number stays one where any number is meant.
            kept: Any = reduce(or_, [int | float if kind is float else kind for kind in kinds])
            none = ["None"] if len(kinds) > len(wanted) else []
            found[field.name] = TypeAdapter(kept), ", or ".join([*wanted, *none])
    return found


def settle_types(config: TrainingArguments) -> None:
    """Give every number, truth value and list its type, where what was given can be nothing else.

    YAML reads 1e-4 as a text, which fails deep inside an optimizer, and "false" as a text is true.

    Raises:
        ConfigError: a value of another type, such as a text where a list is meant.
    """
    kind: Any = type(config)  # type checkers take the class for unhashable, because its objects are
    for name, (adapter, wanted) in _plain_types(kind).items():
        given = getattr(config, name)
        value = given.item() if isinstance(given, np.generic) else given
        if isinstance(value, Mapping):
            continue  # `reward_weights` by name, which Python alone can give: checked with the rewards
        try:
            if isinstance(value, bool) and "true" not in wanted:  # which Python counts among the numbers
                raise ValueError
            setattr(config, name, adapter.validate_python(value))
        except ValueError:
            raise ConfigError(f"{name}={given!r} cannot be used; it must be {wanted}") from None


def check_rules(config: TrainingArguments) -> None:
    """Check every setting that has a rule.

    Raises:
        ConfigError: a setting breaks its rule; the nearest choice is named where there are some.
    """
    for names, rule in rules_of(type(config)).items():
        values = tuple(getattr(config, name) for name in names.split(", "))
        value = values if len(values) > 1 else values[0]
        if not rule.holds(value):
            meant = f".{nearest(str(value), rule.choices)}" if rule.choices else ""
            raise ConfigError(f"{names}={value!r} cannot be used; it must be {rule.wanted}{meant}")


def check_together(config: Any) -> None:
    """Check the settings of an `RDMConfig` that must fit together.

    Raises:
        ConfigError: two of them do not; says which, and what to do.
    """
    if config.resolutions is not None:
        _require(len(config.resolutions) > 0, "resolutions", config.resolutions, "a list of sizes, or None")
        if config.height is not None or config.width is not None:
            raise ConfigError("resolutions replaces height and width; give one or the other")
        for resolution in config.resolutions:
            parse_resolution(resolution)
    if config.quantization != "none" and "full" in (config.student_weights, config.critic_weights):
        raise ConfigError(
            f"quantization={config.quantization!r} keeps the base in few bits, which cannot be trained in full; use "
            "student_weights='lora' and critic_weights='lora', or quantization='none'"
        )
    if config.sampler == "cps":
        _require(0 < config.eta <= 1, "eta", config.eta, "in (0, 1] for sampler='cps'")
    if config.sampler == "sde":
        _require(config.eta > 0, "eta", config.eta, "positive for sampler='sde'")
    if config.matching == "path" and config.num_random_steps:
        raise ConfigError(
            f"matching='path' asks the networks where the student goes from one state straight to the next, and "
            f"sampler={config.sampler!r} goes there by fresh noise; use sampler='ode', or matching='step'"
        )
    if config.num_iterations > 1 and config.num_random_steps == 0:
        raise ConfigError(
            f"num_iterations={config.num_iterations} uses a rollout again by how likely its transitions still are, "
            f"and sampler={config.sampler!r} with num_inference_steps={config.num_inference_steps} has none with a "
            "density; use a random sampler with two steps or more, or num_iterations=1"
        )
    if config.multi_objective_aggregation == "normalize_then_sum" and config.scale_rewards != "group":
        raise ConfigError(
            f"scale_rewards={config.scale_rewards!r} cannot be used with "
            "multi_objective_aggregation='normalize_then_sum', which divides scores by their group's deviation in "
            "any case; use scale_rewards='group', or 'sum_then_normalize'"
        )
    if config.watch == "stop" and IntervalStrategy(config.logging_strategy) == IntervalStrategy.NO:
        raise ConfigError("watch='stop' looks at what is logged, and logging_strategy='no' logs nothing")
    if config.per_device_train_batch_size % config.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size={config.per_device_train_batch_size} counts samples and must be a multiple "
            f"of num_generations={config.num_generations}, so that groups stay whole"
        )


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} cannot be used; it must be {wanted}")


def default_of(setting: Field[Any]) -> Any:
    """Return the value of a setting that nobody gives."""
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def check_known(names: list[str], known: list[str]) -> None:
    """Raise `ConfigError` for the first setting that does not exist, naming the nearest one that does."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}.{nearest(name, known)}")


def parse_resolution(text: str) -> tuple[int, int]:
    """Return height and width of "1024x832".

    Raises:
        ConfigError: it is no such text.
    """
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", str(text))
    if match is None:
        raise ConfigError(f"resolutions: {text!r} is no size; write height x width in pixels, such as '1024x832'")
    return int(match[1]), int(match[2])
