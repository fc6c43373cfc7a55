"""The public names, and where they are: `lazy.attach` and type checkers read them here."""

from rdm_sdk.testing.batches import example_batch as example_batch
from rdm_sdk.testing.batches import example_images as example_images
from rdm_sdk.testing.family_kit import MODEL_CHECKS as MODEL_CHECKS
from rdm_sdk.testing.family_kit import ModelCheckError as ModelCheckError
from rdm_sdk.testing.family_kit import ModelCheckWarning as ModelCheckWarning
from rdm_sdk.testing.family_kit import check_model as check_model
from rdm_sdk.testing.family_kit import parametrize_model_checks as parametrize_model_checks
from rdm_sdk.testing.kit import CheckResult as CheckResult
from rdm_sdk.testing.reward_checks import CHECKS as CHECKS
from rdm_sdk.testing.reward_kit import RewardCheckError as RewardCheckError
from rdm_sdk.testing.reward_kit import RewardCheckWarning as RewardCheckWarning
from rdm_sdk.testing.reward_kit import check_reward as check_reward
from rdm_sdk.testing.reward_kit import parametrize_reward_checks as parametrize_reward_checks
from rdm_sdk.testing.reward_kit import run_reward_checks as run_reward_checks
from rdm_sdk.testing.tiny import randomized as randomized
from rdm_sdk.testing.tiny import save_tiny_clip as save_tiny_clip
from rdm_sdk.testing.tiny import tiny_clip_config as tiny_clip_config
from rdm_sdk.testing.tiny import tiny_gemma_tokenizer as tiny_gemma_tokenizer
from rdm_sdk.testing.tiny import tiny_qwen_tokenizer as tiny_qwen_tokenizer
from rdm_sdk.testing.tiny import tiny_t5_tokenizer as tiny_t5_tokenizer
from rdm_sdk.testing.tiny import tiny_tokenizer as tiny_tokenizer
from rdm_sdk.testing.tiny_llava import save_tiny_llava as save_tiny_llava
from rdm_sdk.testing.tiny_llava import save_tiny_llava_processor as save_tiny_llava_processor
