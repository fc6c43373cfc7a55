"""Named settings of known methods, so that anyone can rerun a comparison; `rdm-sdk presets show NAME` prints one.

A preset is nothing but values of `RDMConfig` and a reward spec to start from. Whatever you set beside it wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

from rdm_sdk.errors import ConfigError, nearest

Value = str | int | float | bool


@dataclass(frozen=True)
class Preset:
    """One method's settings."""

    summary: str
    rewards: str
    """The reward spec to start from; `legibility` stands for your own."""
    settings: dict[str, Value] = field(default_factory=dict)
    """`RDMConfig` fields that make the method what it is."""


_DMD2: dict[str, Value] = {
    "matching": "mixture",
    "normalization": "sample",
    "spread": "free",
    "critic_correction": "none",
    "critic_rollouts": "fresh",
    "num_iterations": 1,
}
_GNDM: dict[str, Value] = {
    "matching": "step",
    "normalization": "sample",
    "spread": "stratified",
    "critic_correction": "others",
    "num_generations": 8,
    "num_iterations": 1,
}

_EACH: dict[str, Value] = {"multi_objective_aggregation": "normalize_then_sum"}
"""Rewards in different units are normalized before weights that are shares of a pull add them up."""

PRESETS = {
    "dmd2": Preset(
        "distribution matching with every sample by itself (arXiv 2405.14867): the baseline of GNDM",
        "dm",
        _DMD2 | {"num_generations": 1, "weighting": "fixed"},
    ),
    "gndm": Preset(
        "distribution matching with groups: levels spread over a group, the critic's lag taken out by it, samples "
        "normalized one by one (arXiv 2603.28460, our reading)",
        "dm",
        _GNDM | {"weighting": "fixed"},
    ),
    "pdmd": Preset(
        "distribution matching on the path of a deterministic student, across the critic's residual (arXiv 2609.35768)",
        "dm",
        _GNDM | {"matching": "path", "sampler": "ode", "weighting": "fixed"},
    ),
    "dmdr": Preset(
        "DMD2 plus rewards at a fixed weight after a cold start (arXiv 2511.13649): the baseline of GNDMR",
        "dm + 0.05*legibility",
        _DMD2 | {"num_generations": 8, "reward_route": "gradient", "weighting": "fixed[cold_start=20]"},
    ),
    "gndmr": Preset(
        "GNDM plus rewards at adaptive weights (arXiv 2603.28460, our reading); a weight is a share of dm's pull",
        "dm + 0.5*legibility",
        _GNDM | {"reward_route": "gradient", "weighting": "balance[cold_start=20,ramp=10]"} | _EACH,
    ),
    "tilt": Preset(
        "GNDM plus rewards that tilt the teacher (ours, docs/method.md); a weight is in deviations of the reward",
        "dm + 0.5*legibility",
        _GNDM | {"reward_route": "tilt", "weighting": "fixed"},
    ),
    "refl": Preset(
        "reward back-propagation alone: what happens without distribution matching (arXiv 2304.05977)",
        "legibility",
        {"reward_route": "gradient", "num_generations": 8, "num_iterations": 1, "weighting": "fixed"},
    ),
    "grpo": Preset(
        "group-relative policy optimization on scores, with dm as the regularizer (arXiv 2402.03300, 2505.05470)",
        "dm + 0.5*legibility",
        _GNDM | {"reward_route": "advantage", "scale_rewards": "group", "ratio_reduction": "sum", "weighting": "fixed"},
    ),
}


def preset(name: str) -> dict[str, Value]:
    """Return a preset's settings: `RDMConfig(output_dir="outputs", **preset("gndm"))`.

    Raises:
        ConfigError: there is no such preset.
    """
    return dict(find_preset(name).settings)


def find_preset(name: str) -> Preset:
    """Return a preset, or raise `ConfigError` with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}.{nearest(name, PRESETS)} There are: {', '.join(PRESETS)}")
    return PRESETS[name]


def show_preset(name: str) -> str:
    """Return a preset as YAML for `rdm-sdk train --config`."""
    found = find_preset(name)
    settings = yaml.safe_dump({"rewards": found.rewards} | found.settings, sort_keys=False)
    return f"# {name}: {found.summary}\n{settings.rstrip()}"
