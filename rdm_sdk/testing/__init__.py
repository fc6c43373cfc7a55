"""For authors of plugins: the contract kits, batches to try rewards on, and tiny offline models.

The names load on first use: a reward's tests import neither diffusers nor PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_sdk.testing.batches import example_batch, example_images
    from rdm_sdk.testing.family_kit import (
        MODEL_CHECKS,
        ModelCheckError,
        ModelCheckWarning,
        check_model,
        parametrize_model_checks,
    )
    from rdm_sdk.testing.kit import CheckResult
    from rdm_sdk.testing.reward_checks import CHECKS
    from rdm_sdk.testing.reward_kit import (
        RewardCheckError,
        RewardCheckWarning,
        check_reward,
        parametrize_reward_checks,
        run_reward_checks,
    )
    from rdm_sdk.testing.tiny import (
        randomized,
        save_tiny_clip,
        tiny_clip_config,
        tiny_gemma_tokenizer,
        tiny_qwen_tokenizer,
        tiny_t5_tokenizer,
        tiny_tokenizer,
    )
    from rdm_sdk.testing.tiny_llava import save_tiny_llava, save_tiny_llava_processor

_HOME = {
    "CHECKS": "reward_checks",
    "MODEL_CHECKS": "family_kit",
    "CheckResult": "kit",
    "ModelCheckError": "family_kit",
    "ModelCheckWarning": "family_kit",
    "RewardCheckError": "reward_kit",
    "RewardCheckWarning": "reward_kit",
    "check_model": "family_kit",
    "check_reward": "reward_kit",
    "example_batch": "batches",
    "example_images": "batches",
    "parametrize_model_checks": "family_kit",
    "parametrize_reward_checks": "reward_kit",
    "randomized": "tiny",
    "run_reward_checks": "reward_kit",
    "save_tiny_clip": "tiny",
    "save_tiny_llava": "tiny_llava",
    "save_tiny_llava_processor": "tiny_llava",
    "tiny_clip_config": "tiny",
    "tiny_gemma_tokenizer": "tiny",
    "tiny_qwen_tokenizer": "tiny",
    "tiny_t5_tokenizer": "tiny",
    "tiny_tokenizer": "tiny",
}

__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "CheckResult",
    "ModelCheckError",
    "ModelCheckWarning",
    "RewardCheckError",
    "RewardCheckWarning",
    "check_model",
    "check_reward",
    "example_batch",
    "example_images",
    "parametrize_model_checks",
    "parametrize_reward_checks",
    "randomized",
    "run_reward_checks",
    "save_tiny_clip",
    "save_tiny_llava",
    "save_tiny_llava_processor",
    "tiny_clip_config",
    "tiny_gemma_tokenizer",
    "tiny_qwen_tokenizer",
    "tiny_t5_tokenizer",
    "tiny_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
