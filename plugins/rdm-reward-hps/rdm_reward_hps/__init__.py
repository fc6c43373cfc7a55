"""HPS v2 and v2.1 as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "HPS v2 and v2.1: people's preference among images of a prompt"
    register("hps", "rdm_reward_hps.reward:HumanPreferenceScore", description=description)
