"""The cells of `mixture.py`: which settings are compared, for the study's questions a and c."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rdm_sdk.method.draws import Spread

BATCH = 64
COMMON: dict[str, Any] = {
    "matching": "mixture",
    "critic_steps": 5,
    "learning_rate": 2e-3,
    "critic_learning_rate": 3e-3,
    "per_device_train_batch_size": BATCH,
}
"""Settings that all cells share, beside `RDMConfig`'s defaults."""
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SHORT = {"num_generations": "G", "learning_rate": "lr", "num_iterations": "uses"}
SHORT |= {"critic_steps": "critic"}


@dataclass(frozen=True)
class Cell:
    """One set of settings of `RDMConfig`; it is run once per seed."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    step_spread: Spread | None = None
    """How trained steps are spread inside a group, where not as noise levels are."""

    @property
    def content(self) -> dict[str, Any]:
        """All that the cell's runs depend on."""
        return COMMON | self.settings | {"step_spread": self.step_spread}

    def but(self, name: str = "", **settings: Any) -> Cell:
        """Return a cell with some settings changed, by default named after their values."""
        suffix = "_".join(f"{SHORT.get(key, '')}{value}" for key, value in settings.items())
        return replace(self, name=name or f"{self.name}_{suffix}", settings=self.settings | settings)


DMD2 = Cell("dmd2", {"spread": "free", "critic_correction": "none", "num_generations": 1})
FREE = DMD2.but("free", num_generations=8)
STRATIFIED = FREE.but("stratified", spread="stratified")
GNDM = STRATIFIED.but("gndm", critic_correction="others")
SHARED = STRATIFIED.but("shared", spread="shared")
GNDM_SHARED = GNDM.but("gndm_shared", spread="shared")
SWEPT = (DMD2, STRATIFIED, GNDM, SHARED, GNDM_SHARED)
ONE_STEP = replace(GNDM, name="gndm_one_step", step_spread="shared")  # is it the step or the level that one shares?


def estimators() -> list[Cell]:
    """Return question a's: what GNDM's parts are worth, and at which learning rate each variant breaks."""
    return [
        # Draws and correction apart: free draws without it are `dmd2`, stratified ones `stratified`.
        *(*SWEPT, GNDM.but(spread="free")),
        # Group statistics, beside DMD2's free draws and beside everything of GNDM.
        *(base.but(normalization="group") for base in (FREE, GNDM)),
        *(base.but(normalization="group", learning_rate=rate) for base in (FREE, GNDM) for rate in (4e-3, 8e-3)),
        *(GNDM.but(num_generations=g) for g in (1, 4, 16)),
        *(ONE_STEP.but(learning_rate=rate) for rate in (2e-3, 8e-3, 1.6e-2)),
        *(base.but(critic_steps=1) for base in SWEPT),  # a critic that lags: the correction's case
        *(base.but(learning_rate=rate) for base in SWEPT for rate in RATES if rate != COMMON["learning_rate"]),
    ]


def reuse() -> list[Cell]:
    """Return question c's: student updates per rollout, with and without importance weights; one is `stratified`."""
    unweighted = STRATIFIED.but("unweighted", importance_sampling_correction=False)
    return [base.but(num_iterations=uses) for base in (STRATIFIED, unweighted) for uses in (2, 4, 8)]


def all_cells() -> list[Cell]:
    """Return every cell."""
    return estimators() + reuse()
