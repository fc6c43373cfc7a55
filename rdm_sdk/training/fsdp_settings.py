"""`fsdp` and `fsdp_config` of transformers, of which one form is done: the frozen base shared out by FSDP2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rdm_sdk.errors import ConfigError

DONE = {"version": 2, "reshard_after_forward": True}
"""What `fsdp_config` may say, which is what is done in any case."""


@contextmanager
def sharding_of_ours(config: Any) -> Iterator[None]:
    """Hide `fsdp` from transformers, which would have accelerate share out all networks, and let it be True after.

    Raises:
        ConfigError: another form of FSDP is asked for, or a setting does not go with it.
    """
    wanted = _is_wanted(config)
    if wanted:
        _check_together(config)
    config.fsdp = config.fsdp_config = None
    yield
    if wanted:
        config.fsdp, config.fsdp_config = True, {"version": 2}


def _is_wanted(config: Any) -> bool:
    """Return whether the base is to be shared out; raises `ConfigError` for what is not done."""
    given = " ".join(map(str, config.fsdp)) if isinstance(config.fsdp, (list, tuple)) else config.fsdp
    wanted = given is True or str(given).lower() in ("true", "full_shard")  # as text from command lines and YAML
    if not wanted and str(given or "").lower() not in ("", "false", "none"):
        raise ConfigError(
            f"fsdp={config.fsdp!r} is not supported: the frozen base can be shared out between all processes "
            "(fsdp=True or 'full_shard'), and nothing else"
        )
    options = {name.removeprefix("fsdp_"): value for name, value in _options(config.fsdp_config).items()}
    for name, value in options.items():
        if str(value).lower() != str(DONE.get(name, "")).lower():
            raise ConfigError(
                f"fsdp_config={config.fsdp_config!r} is not supported: FSDP2 shares out the base block by block, and "
                f"what else can be said is {DONE}. Leave out {name}"
            )
    if options and not wanted:
        raise ConfigError(f"fsdp_config={config.fsdp_config!r} does nothing without fsdp=True; set both or none")
    return wanted


def _options(given: Any) -> dict[str, Any]:
    """Return what `fsdp_config` holds: a mapping, or JSON, or the path of a file with some."""
    if isinstance(given, str):
        try:
            text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
            given = json.loads(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"fsdp_config={given!r} is neither JSON nor a file that holds any: {error}") from error
    if not isinstance(given or {}, dict):
        raise ConfigError(f"fsdp_config={given!r} cannot be used; it must be a mapping, such as {{'version': 2}}")
    return dict(given or {})


def _check_together(config: Any) -> None:
    """Raise `ConfigError` if a setting does not go with a base that is shared out."""
    apart = "processes would run its blocks another number of times, and wait for each other for ever"
    copied = "a full copy of the base is trained, which is not shared"
    cases = {
        "student_weights": (config.student_weights == "full", copied),
        "critic_weights": (config.critic_weights == "full", copied),
        "quantization": (config.quantization != "none", "layers in few bits cannot be taken apart"),
        # Transformers takes a backend or a mode for torch_compile=True, but later.
        **{
            name: (getattr(config, name), "what is compiled has not been tried with weights that come and go")
            for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        },
        "critic_rollouts": (
            config.critic_rollouts == "fresh",
            f"trajectories are followed to other depths on each process, so {apart}; use 'shared'",
        ),
        "importance_sampling_correction": (
            config.num_iterations > 1 and config.importance_sampling_correction,
            "with num_iterations above 1, trajectories are evaluated up to other steps on each process, so "
            f"{apart}; use num_iterations=1, or importance_sampling_correction=False",
        ),
    }
    for name, (holds, why) in cases.items():
        if holds:
            raise ConfigError(f"fsdp=True and {name}={getattr(config, name)!r} cannot be used together: {why}")
