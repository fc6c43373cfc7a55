"""Yahoo's open_nsfw as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "safety",
        "rdm_reward_safety.reward:Safety",
        description="the probability that the picture is safe for work, by Yahoo's open_nsfw",
    )
