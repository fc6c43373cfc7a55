"""PickScore as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "PickScore: people's choice among images of a prompt"
    register("pickscore", "rdm_reward_pickscore.reward:PickScore", description=description)
