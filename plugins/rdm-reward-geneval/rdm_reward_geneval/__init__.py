"""GenEval's rules, on an open-vocabulary detector, and GenEval 2's Soft-TIFA as rewards for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    description = "GenEval: whether the objects, counts, colors and positions asked for are in the picture"
    register("geneval", "rdm_reward_geneval.reward:GenEval", description=description)
    description = "GenEval 2's Soft-TIFA: how probable a model finds the right answers about a prompt's atoms"
    register("geneval2", "rdm_reward_geneval.geneval2:GenEval2", description=description)
