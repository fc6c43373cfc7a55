"""The SDK's own rewards, registered as any plugin registers its own."""

from __future__ import annotations

from rdm_sdk.plugins.hookspecs import RegisterReward, hookimpl


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "dm",
        "rdm_sdk.rewards.dm:DistributionMatching",
        description="distribution matching: the teacher against a critic of the student's samples",
    )
    register(
        "legibility",
        "rdm_sdk.digits.reward:Legibility",
        description="probability that an image of the embedded digits shows the prompt's digit",
    )
    register(
        "guidance",
        "rdm_sdk.rewards.guidance:Guidance",
        description="classifier-free guidance: how much more likely the teacher finds a sample with its prompt",
    )
    register(
        "flow",
        "rdm_sdk.rewards.flow:TeacherFlow",
        description="how near a sample of the student's last step is to where the teacher's flow leads from its state",
    )
    register(
        "adversarial",
        "rdm_sdk.rewards.adversarial:Adversarial",
        description="a discriminator on the teacher's features, which learns from a column of real images",
    )
    register(
        "remote",
        "rdm_sdk.serving.remote:Remote",
        description="any reward that an 'rdm-sdk serve' answers for, on another machine or in another environment",
    )
    register(
        "isolated",
        "rdm_sdk.serving.isolated:Isolated",
        description="any reward, in a process and a Python environment of its own",
    )
