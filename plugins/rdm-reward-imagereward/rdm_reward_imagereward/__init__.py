"""ImageReward as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "imagereward",
        "rdm_reward_imagereward.reward:ImageReward",
        description="ImageReward: what people prefer, by BLIP-L with the prompt",
    )
