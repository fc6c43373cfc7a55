"""GenEval's rules, on an open-vocabulary detector, as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "GenEval: whether the objects, counts, colors and positions asked for are in the picture"
    register("geneval", "rdm_reward_geneval.reward:GenEval", description=description)
