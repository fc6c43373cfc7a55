"""Distill diffusion models into few-step LoRA students, with distribution matching as one reward among equals.

The public names below load on first use: `import rdm_sdk` imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rdm_sdk._version import __version__ as __version__
from rdm_sdk.quiet import silence_harmless_warnings as _silence_harmless_warnings

_silence_harmless_warnings()

_PUBLIC = {
    "RDMTrainer": "rdm_sdk.training.trainer",
    "RDMConfig": "rdm_sdk.training.config",
    "Reward": "rdm_sdk.rewards.base",
    "RewardBatch": "rdm_sdk.rewards.base",
    "RewardOutput": "rdm_sdk.types",
    "RewardConfig": "rdm_sdk.rewards.base",
    "Capabilities": "rdm_sdk.rewards.capabilities",
    "declares": "rdm_sdk.rewards.callables",
    "RewardTerm": "rdm_sdk.rewards.spec",
    "parse_spec": "rdm_sdk.rewards.spec",
    "score_images": "rdm_sdk.rewards.scoring",
    "evaluate": "rdm_sdk.evaluation.run",
    "EvaluationResult": "rdm_sdk.evaluation.result",
    "score_folder": "rdm_sdk.evaluation.folder",
    "write_report": "rdm_sdk.evaluation.report.page",
    "hookimpl": "rdm_sdk.plugins.hookspecs",
    "RegisterReward": "rdm_sdk.plugins.hookspecs",
    "RegisterModel": "rdm_sdk.plugins.hookspecs",
    "ModelFamily": "rdm_sdk.families.base",
    "FlowFamily": "rdm_sdk.families.flow",
    "DDPMFamily": "rdm_sdk.families.ddpm",
    "Weighting": "rdm_sdk.training.weighting",
    "RewardStatistics": "rdm_sdk.training.weighting",
    "preset": "rdm_sdk.training.presets",
    "plan_memory": "rdm_sdk.planning.plan",
    "MemoryPlan": "rdm_sdk.planning.plan",
    "RDMError": "rdm_sdk.errors",
    "ConfigError": "rdm_sdk.errors",
    "DataError": "rdm_sdk.errors",
    "ModelError": "rdm_sdk.errors",
    "CheckpointError": "rdm_sdk.errors",
    "RewardError": "rdm_sdk.errors",
    "frechet_distance": "rdm_sdk.digits.metrics",
    "feature_statistics": "rdm_sdk.digits.metrics",
    "teacher_statistics": "rdm_sdk.digits.metrics",
    "legibility": "rdm_sdk.digits.metrics",
    "diversity": "rdm_sdk.evaluation.variety",
    "teacher_steps_worth": "rdm_sdk.evaluation.variety",
    "image_grid": "rdm_sdk.training.pictures",
    "markdown_table": "rdm_sdk.training.pictures",
}
_SUBMODULES = ("digits",)

__all__ = [  # noqa: RUF022 - in the order of _PUBLIC
    "RDMTrainer",
    "RDMConfig",
    "Reward",
    "RewardBatch",
    "RewardOutput",
    "RewardConfig",
    "Capabilities",
    "declares",
    "RewardTerm",
    "parse_spec",
    "score_images",
    "evaluate",
    "EvaluationResult",
    "score_folder",
    "write_report",
    "hookimpl",
    "RegisterReward",
    "RegisterModel",
    "ModelFamily",
    "FlowFamily",
    "DDPMFamily",
    "Weighting",
    "RewardStatistics",
    "preset",
    "plan_memory",
    "MemoryPlan",
    "RDMError",
    "ConfigError",
    "DataError",
    "ModelError",
    "CheckpointError",
    "RewardError",
    "frechet_distance",
    "feature_statistics",
    "teacher_statistics",
    "legibility",
    "diversity",
    "teacher_steps_worth",
    "image_grid",
    "markdown_table",
    "digits",
]

if TYPE_CHECKING:
    from rdm_sdk import digits as digits
    from rdm_sdk.digits.metrics import feature_statistics as feature_statistics
    from rdm_sdk.digits.metrics import frechet_distance as frechet_distance
    from rdm_sdk.digits.metrics import legibility as legibility
    from rdm_sdk.digits.metrics import teacher_statistics as teacher_statistics
    from rdm_sdk.errors import (
        CheckpointError as CheckpointError,
    )
    from rdm_sdk.errors import (
        ConfigError as ConfigError,
    )
    from rdm_sdk.errors import (
        DataError as DataError,
    )
    from rdm_sdk.errors import (
        ModelError as ModelError,
    )
    from rdm_sdk.errors import (
        RDMError as RDMError,
    )
    from rdm_sdk.errors import (
        RewardError as RewardError,
    )
    from rdm_sdk.evaluation.folder import score_folder as score_folder
    from rdm_sdk.evaluation.report.page import write_report as write_report
    from rdm_sdk.evaluation.result import EvaluationResult as EvaluationResult
    from rdm_sdk.evaluation.run import evaluate as evaluate
    from rdm_sdk.evaluation.variety import diversity as diversity
    from rdm_sdk.evaluation.variety import teacher_steps_worth as teacher_steps_worth
    from rdm_sdk.families.base import ModelFamily as ModelFamily
    from rdm_sdk.families.ddpm import DDPMFamily as DDPMFamily
    from rdm_sdk.families.flow import FlowFamily as FlowFamily
    from rdm_sdk.planning.plan import MemoryPlan as MemoryPlan
    from rdm_sdk.planning.plan import plan_memory as plan_memory
    from rdm_sdk.plugins.hookspecs import RegisterModel as RegisterModel
    from rdm_sdk.plugins.hookspecs import RegisterReward as RegisterReward
    from rdm_sdk.plugins.hookspecs import hookimpl as hookimpl
    from rdm_sdk.rewards.base import Reward as Reward
    from rdm_sdk.rewards.base import RewardBatch as RewardBatch
    from rdm_sdk.rewards.base import RewardConfig as RewardConfig
    from rdm_sdk.rewards.callables import declares as declares
    from rdm_sdk.rewards.capabilities import Capabilities as Capabilities
    from rdm_sdk.rewards.scoring import score_images as score_images
    from rdm_sdk.rewards.spec import RewardTerm as RewardTerm
    from rdm_sdk.rewards.spec import parse_spec as parse_spec
    from rdm_sdk.training.config import RDMConfig as RDMConfig
    from rdm_sdk.training.pictures import image_grid as image_grid
    from rdm_sdk.training.pictures import markdown_table as markdown_table
    from rdm_sdk.training.presets import preset as preset
    from rdm_sdk.training.trainer import RDMTrainer as RDMTrainer
    from rdm_sdk.training.weighting import RewardStatistics as RewardStatistics
    from rdm_sdk.training.weighting import Weighting as Weighting
    from rdm_sdk.types import RewardOutput as RewardOutput


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
