"""For authors of plugins: the contract kit, batches to try rewards on, and tiny offline models."""

from rdm_sdk.testing.batches import example_batch, example_images
from rdm_sdk.testing.checks import CHECKS
from rdm_sdk.testing.models import save_tiny_clip, tiny_clip_config, tiny_tokenizer
from rdm_sdk.testing.rewards import (
    CheckResult,
    RewardCheckError,
    RewardCheckWarning,
    check_reward,
    parametrize_reward_checks,
    run_reward_checks,
)

__all__ = [
    "CHECKS",
    "CheckResult",
    "RewardCheckError",
    "RewardCheckWarning",
    "check_reward",
    "example_batch",
    "example_images",
    "parametrize_reward_checks",
    "run_reward_checks",
    "save_tiny_clip",
    "tiny_clip_config",
    "tiny_tokenizer",
]
