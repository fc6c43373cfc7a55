"""A vision-language model's yes or no (VQAScore) as a reward for rdm-sdk."""

from rdm_sdk import RegisterReward, hookimpl

__version__ = "0.1.0"


@hookimpl
def rdm_register_rewards(register: RegisterReward) -> None:
    register(
        "vlm",
        "rdm_reward_vlm.reward:VlmJudge",
        description="VQAScore: how sure a vision-language model is that the image shows the prompt",
    )
    register(
        "vlm-api",
        "rdm_reward_vlm.api:VlmApi",
        description="vlm of a model behind OpenAI's API: vLLM, SGLang, llama.cpp, OpenAI",
    )
