"""CLIPScore as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register("clip", "rdm_reward_clip.reward:ClipScore", description="CLIPScore: how well an image fits its prompt")
