"""For authors of plugins: the contract kits, batches to try rewards on, and tiny offline models."""

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
    "tiny_clip_config",
    "tiny_gemma_tokenizer",
    "tiny_qwen_tokenizer",
    "tiny_t5_tokenizer",
    "tiny_tokenizer",
]
