"""Text in pictures (optical character recognition) as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "ocr",
        "rdm_reward_ocr.reward:TextInPicture",
        description="how much of the text that a prompt asks for can be read in the picture",
    )
