"""Settings and fixtures every test shares.

The process that hands tests to others imports this file and runs none, while those wait; so nothing heavy is imported
before the tests are.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rdm_sdk import RDMConfig, RDMTrainer

# On some CPUs it warns at import of a kernel for inference that it does not find, and the line would come out behind
# pytest's last one.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Their assertions show values as those of tests do.
pytest.register_assert_rewrite("family_asserts", "pipeline_calls")

SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_sequence_length": 4,
    "guidance_scale": 1.0,
    "critic_steps": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}
"""Settings of a run that takes about a second."""


def pytest_collection_finish() -> None:
    """Keep what the imports made out of the garbage collector, which Trainer runs at the start of every training."""
    import torch
    from import_checks import check_imports_together

    # The tests' tensors are tiny: more threads only cost time, and change the order of sums.
    torch.set_num_threads(1)
    check_imports_together()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_config() -> Callable[..., RDMConfig]:
    """Return `make(output_dir, **settings)`: the config of a small run, with some settings replaced."""

    from rdm_sdk import RDMConfig

    def make(output_dir: str | Path, **settings: Any) -> RDMConfig:
        return RDMConfig(output_dir=str(output_dir), **(SMALL | settings))

    return make


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of the embedded teacher with one transformer block; see `small_teacher`."""
    from small_teacher import save_small_teacher

    return str(save_small_teacher(tmp_path_factory.mktemp("small") / "teacher"))


@pytest.fixture(scope="session")
def make_digits_trainer(small_config: Callable[..., RDMConfig]) -> Callable[..., RDMTrainer]:
    """Return `make(output_dir, rewards=..., prompts=..., **settings)`: a small run on the embedded teacher.

    `model`, `peft_config`, `fake_peft_config`, `callbacks`, `eval_dataset` and a `weighting` that is an object go to
    the trainer, all else to `args`.
    """
    from rdm_sdk import RDMTrainer, digits

    own = ("model", "peft_config", "fake_peft_config", "callbacks", "eval_dataset")

    def make(output_dir: str | Path, rewards: Any = "dm", prompts: object = None, **settings: Any) -> RDMTrainer:
        passed = {name: settings.pop(name) for name in own if name in settings}
        if not isinstance(settings.get("weighting", ""), str):
            passed["weighting"] = settings.pop("weighting")
        return RDMTrainer(
            passed.pop("model", digits.teacher_path()),
            rewards,
            small_config(output_dir, **settings),
            digits.prompts() if prompts is None else prompts,
            **passed,
        )

    return make


@pytest.fixture(scope="session")
def make_trainer(make_digits_trainer: Callable[..., RDMTrainer], small_teacher: str) -> Callable[..., RDMTrainer]:
    """Return the same with a model of one block, in half the time: for what does not depend on the network."""
    return lambda *args, **settings: make_digits_trainer(*args, **({"model": small_teacher} | settings))


@pytest.fixture(scope="session")
def losses_of() -> Callable[[RDMTrainer], list[dict[str, float]]]:
    """Return `losses(trainer)`: what it logged per step, without figures of time."""

    def losses(trainer: RDMTrainer) -> list[dict[str, float]]:
        rows = [row for row in trainer.state.log_history if "loss" in row]
        return [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k} for row in rows]

    return losses
