"""JPEG compressibility as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "jpeg",
        "rdm_reward_jpeg.reward:JpegCompressibility",
        description="minus the kilobytes of the image as a JPEG: how compressible it is",
    )
