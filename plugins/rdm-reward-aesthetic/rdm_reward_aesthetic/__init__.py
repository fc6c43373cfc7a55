"""LAION's aesthetic predictors as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "aesthetic predictors (LAION v1 and v2, v2.5 on SigLIP): how much people like a picture"
    register("aesthetic", "rdm_reward_aesthetic.reward:AestheticScore", description=description)
