"""HPSv3 as a differentiable reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "HPSv3: people's preference among images of a prompt, by Qwen2-VL-7B"
    register("hpsv3", "rdm_reward_hpsv3.reward:HumanPreferenceScore3", description=description)
