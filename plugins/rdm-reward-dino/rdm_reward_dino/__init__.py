"""DINOv2 diversity of a group as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "dino",
        "rdm_reward_dino.reward:DinoDiversity",
        description="how far an image is from the others of its prompt, by DINOv2",
    )
