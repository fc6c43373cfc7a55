"""HPSv3: how well people like an image of a prompt, by a vision-language model with a head of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from rdm_reward_hpsv3.model import PIXELS, load_scorer
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig
from rdm_sdk.vision import PretrainedConfig, find_file, read_tensors

HUB, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"


class HumanPreferenceScore3(Reward):
    """HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads image and prompt, a head predicts people's rating; its mean counts.

    Usual scores are 5 to 13; they are unbounded, and not comparable to those of `hps`. Differentiable: the image
    becomes patches in torch, as transformers' own processor makes them. A prompt that holds one of the model's control
    tokens, such as "<|im_end|>", cannot be read, so the reward is not for it.
    """

    name = "hpsv3"
    capabilities = Capabilities(space="pixel", gradient="autograd", prompts=True, parameters=7_748_610_610)

    class Config(PretrainedConfig):
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        """Dtype of the model's weights; the head is float32 in any case."""
        base: str = BASE
        """A hub id or local folder with Qwen2-VL's config and tokenizer; its weights are not read."""

    config: Config
    pixels = PIXELS
    preprocessing = "8 bits, bicubic to about 256 * 28 * 28 pixels with sides that 28 divides"

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        file = find_file(self.config.path or HUB, FILE, self.config.revision)
        self.scorer = load_scorer(
            read_tensors(file), self.config.base, f"HPSv3 at {str(file)!r}", self.config.torch_dtype
        )

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        return [self.scorer.can_read(prompt) for prompt in prompts]

    def score(self, batch: RewardBatch) -> Tensor:
        return self.scorer.score(batch.images, batch.prompts, self.pixels)
