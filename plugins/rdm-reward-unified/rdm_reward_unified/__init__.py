"""UnifiedReward as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "UnifiedReward: a vision-language model writes how well an image fits its prompt, from 1 to 5"
    register("unified", "rdm_reward_unified.reward:UnifiedReward", description=description)
    description = "unified of a model behind OpenAI's API, such as one that vLLM serves"
    register("unified-api", "rdm_reward_unified.api:UnifiedApi", description=description)
