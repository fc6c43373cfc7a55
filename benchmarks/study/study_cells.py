"""The cells of the study: which settings are compared, for which question. `study.py` runs them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rdm_sdk import preset

COMMON: dict[str, Any] = {
    "max_steps": 64,
    "per_device_train_batch_size": 32,
    "guidance_scale": 1.0,
    "max_sequence_length": 4,
    "critic_steps": 5,
    "learning_rate": 1.6e-3,
    "critic_learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
}
"""What all cells share. Every cell spends max_steps * batch teacher forwards (twice that where the teacher is asked
without the prompt as well): the study's currency. The base rate was set after pilots of both methods."""

UNNAMED: dict[str, Any] = {
    "matching": "mixture",
    "critic_rollouts": "shared",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "ema_decay": 0.0,
    "multi_objective_aggregation": "normalize_then_sum",
}
"""What all cells share as well and no name says: there was no choice, or it was the default, when they were run. Since
then critics learn at all noise levels and from all steps of shared rollouts, so the runs cannot be repeated exactly."""

LORA_TARGETS = (
    r".*\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|ff\.net\.0\.proj|ff\.net\.2)"
)
"""The layers that had adapters: too few, as docs/convergence.md shows."""

RATES = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
"""Student learning rates of the sweep, a factor of two apart."""

METHODS = ("dmd2", "gndm")
"""The presets that are swept over the rates."""

SEEDS, CONFIRMING_SEEDS = range(5), range(5, 15)
"""Choices (rates, forms, weights) are made on the first; claims are then tested on the others, unseen until then."""

Rewards = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Cell:
    """One set of settings; it is run once per seed."""

    name: str
    questions: str
    """The letters of the questions that it helps to answer."""
    preset: str = "gndm"
    rewards: Rewards = (("dm", 1.0),)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: bool = False
    """Whether quality is measured along the run as well."""

    @property
    def counts_failures(self) -> bool:
        """Whether illegible samples are counted among more: where legibility is a reward, and without rewards."""
        return {name for name, _ in self.rewards} <= {"dm", "legibility"}

    def config(self) -> dict[str, Any]:
        """Return the settings of `RDMConfig` that make up the cell."""
        return self._named() | {key: value for key, value in UNNAMED.items() if key not in self.settings}

    def _named(self) -> dict[str, Any]:
        own = {key: value for key, value in preset(self.preset).items() if key not in UNNAMED}
        return COMMON | own | self.settings

    def digest(self) -> str:
        """Return a hash of all that the cell's runs depend on, so that changed settings are run again."""
        content = asdict(self) | {"config": self._named(), "questions": ""}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def sweep() -> list[Cell]:
    """Question a: at which learning rates does each method converge?"""
    return [
        Cell(name, "a", method, settings={"learning_rate": rate})
        for rate in RATES
        for method in METHODS
        if (name := sweep_cell(method, rate)) != method
    ]


def long_runs() -> list[Cell]:
    """Question a: three times as long, at the rate that was best for both methods."""
    longer = {"max_steps": 192, "learning_rate": 8e-4}
    return [Cell(long_cell(method), "a", method, settings=longer) for method in METHODS]


def long_cell(method: str) -> str:
    """Return the name of a method's long runs."""
    return f"{method}, lr 0.0008, 192 steps"


def sweep_cell(method: str, rate: float) -> str:
    """Return the name of a cell of the sweep."""
    return method if rate == COMMON["learning_rate"] else f"{method}, lr {rate:g}"


def estimators() -> list[Cell]:
    """Question a: GNDM with other corrections, and with one noise level for a group. (The mixture has many more.)"""
    without = {"critic_correction": "none", "learning_rate": 3.2e-3}
    return [
        Cell("gndm without correction, lr 0.0032", "a", settings=without),
        Cell("gndm, shared sigma", "a", settings={"spread": "shared"}),
        *(Cell(f"gndm, groups of {size}", "a", settings={"num_generations": size}) for size in (4, 16)),
        # The control: the batches of the cell above, with two prompts instead of four, without its estimator.
        Cell("dmd2, groups of 16", "a", "dmd2", settings={"num_generations": 16}),
    ]


@dataclass(frozen=True)
class Setting:
    """Rewards that are studied together; one tuple of weights per point of a front, one weight per reward."""

    rewards: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    """Weights of gradients and advantages."""
    shares: tuple[tuple[float, ...], ...]
    """For `balance`: of dm's pull, chosen in single-seed pilots to raise the rewards about as far as the weights do."""
    tilts: tuple[tuple[float, ...], ...]
    """Weights of tilts after a cold start, in deviations of the reward; chosen in pilots and on seeds 0 to 4."""
    early_tilts: tuple[tuple[float, ...], ...]
    """Weights of tilts from the first step on; chosen in pilots."""
    mixed: tuple[tuple[float, ...], ...] = ()
    """Weights of a gradient for `ink` beside a tilt, from the first step on; chosen in pilots."""


SETTINGS = {
    "ink against jpeg": Setting(
        ("ink", "jpeg"),
        ((0.1, 1.0), (0.1, 3.0), (0.3, 3.0)),
        ((0.1, 3.0), (0.2, 6.0)),
        ((0.3, 0.25), (0.4, 0.5)),
        ((0.3, 0.25), (0.4, 0.4)),
        ((0.08, 0.2), (0.1, 0.25), (0.15, 0.4), (0.25, 0.5)),
    ),
    "jpeg": Setting(("jpeg",), ((1.0,), (3.0,)), ((3.0,), (10.0,)), ((0.2,), (0.35,)), ((0.2,), (0.3,), (0.4,))),
    "legibility": Setting(("legibility",), ((0.1,), (0.5,)), ((0.1,), (0.5,)), ((0.5,), (4.0,)), ((1.0,), (2.5,))),
}
"""Two rewards that conflict (correlation -0.47 over real scans of a digit; one is differentiable, one scored), a scored
one, and a differentiable one."""

LATE: dict[str, Any] = {"weighting": "fixed[cold_start=20]"}
LATE_TILT: dict[str, Any] = {"reward_route": "tilt"} | LATE
TILT, MIXED = "tilt from the start", "tilt from the start, ink by gradient"

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dmdr": ("dmdr", "dmd2", {}),
    "dmdr from the start": ("dmdr", "dmd2", {"weighting": "fixed"}),
    "fixed": ("gndmr", "gndm", LATE),
    "balance": ("gndmr", "gndm", {}),
    "constraint": ("gndmr", "gndm", {"weighting": "constraint[cold_start=20,ramp=10]"}),
    "tilt": ("gndm", "gndm", LATE_TILT),
    "tilt on dmd2": ("dmdr", "dmd2", LATE_TILT),
    TILT: ("tilt", "gndm", {}),
    MIXED: ("tilt", "gndm", {"reward_route": "tilt[ink=gradient]"}),
}
"""Methods whose fronts compare: preset, the same method without rewards, and settings. GNDMR stands there with DMDR's
weights, so that only the estimator differs, and with adaptive ones; tilts stand on GNDM's estimator and on DMD2's.
Rewards wait for a cold start of 20 steps, as DMDR's do, unless the name says otherwise."""


def fronts() -> list[Cell]:
    """Question b: reward against FID-SD, and e: what happens to what is not rewarded."""
    cells = []
    for kind, (base, _, settings) in KINDS.items():
        for name, setting in SETTINGS.items():
            for weights in front_weights(kind, name):
                rewards = (("dm", 1.0), *zip(setting.rewards, weights, strict=True))
                cells.append(Cell(front_cell(kind, name, weights), "be", base, rewards, settings))
    return cells


def front_weights(kind: str, setting: str) -> tuple[tuple[float, ...], ...]:
    """Return the weights of the points of a method's front; `constraint` finds its own from the strongest."""
    own = SETTINGS[setting]
    if kind == TILT:
        return own.early_tilts
    if kind == MIXED:
        return own.mixed
    if kind.startswith("tilt"):
        return own.tilts
    if kind == "constraint":
        return own.weights[-1:]
    return own.shares if kind == "balance" else own.weights


def front_cell(kind: str, setting: str, weights: tuple[float, ...]) -> str:
    """Return the name of a cell of a front."""
    return f"{kind}, {setting} {' and '.join(f'{weight:g}' for weight in weights)}"


def front_cells(kind: str, setting: str) -> list[str]:
    """Return the names of the cells of one method's front."""
    return [front_cell(kind, setting, weights) for weights in front_weights(kind, setting)]


FRESH = "gndm, fresh rollouts for every update"
"""No reuse at all: each critic update and each student update has rollouts of its own, as in DMD2."""


def reuse() -> list[Cell]:
    """Question c: student updates per rollout, with and without importance weights."""
    without = {"importance_sampling_correction": False}
    best, twice = {"learning_rate": 8e-4}, {"max_steps": 128}
    return [
        Cell(FRESH, "c", settings={"critic_rollouts": "fresh"}),
        *(Cell(f"{uses} uses", "c", settings={"num_iterations": uses}, curve=True) for uses in (2, 4, 8)),
        *(Cell(f"{n} uses, lr 0.0008", "c", settings={"num_iterations": n, **best}, curve=True) for n in (2, 4, 8)),
        *(Cell(f"{n} uses, no weights", "c", settings={"num_iterations": n, **without}) for n in (4, 8)),
        # What reuse saves, spent: still fewer evaluations than FRESH, and 1/3, 1/6 and 1/12 of its rollouts.
        *(Cell(longer_cell(uses), "c", settings={"num_iterations": uses, **twice}) for uses in (1, 2, 4)),
        Cell(f"{longer_cell(4)}, no weights", "c", settings={"num_iterations": 4, **twice, **without}),
    ]


def longer_cell(uses: int) -> str:
    """Return the name of runs of twice the optimizer steps, at some uses per rollout."""
    return f"{uses} use{'s' if uses > 1 else ''}, 128 steps"


def others() -> list[Cell]:
    """Question d, the rewards that come with the model; and reward back-propagation alone, for e."""
    return [
        Cell("gndm + 0.5 guidance", "d", rewards=(("dm", 1.0), ("guidance", 0.5))),
        Cell("gndm + 0.1 adversarial", "d", rewards=(("dm", 1.0), ("adversarial", 0.1))),
        Cell("refl, legibility", "e", "refl", (("legibility", 1.0),)),
    ]


def all_cells() -> list[Cell]:
    """Return every cell, the most telling ones first."""
    heads = [Cell("dmd2", "ace", "dmd2", curve=True), Cell("gndm", "abcde", curve=True)]
    return [*heads, *sweep(), *long_runs(), *estimators(), *reuse(), *fronts(), *others()]
