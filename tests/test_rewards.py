"""Small promises of the reward contract."""

import numpy as np
import pytest
import torch

from rdm_sdk import CheckpointError, RewardError
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.callables import CallableReward
from rdm_sdk.rewards.evaluate import evaluate_reward


def batch(count: int = 4) -> RewardBatch:
    """Return a batch whose images are its latents, three times."""
    latents = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return RewardBatch(latents, ["a seven"] * count, 2, lambda z: z.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
def test_a_callable_may_return_a_list_a_tensor_or_an_array(kind):
    """All three give the same scores."""

    def ink(images, prompts, **columns):
        values = images.mean(dim=(1, 2, 3))
        return {"list": values.tolist(), "tensor": values, "array": np.asarray(values)}[kind]

    output = evaluate_reward(CallableReward(ink), batch())
    assert torch.allclose(output.scores, batch().latents.mean(dim=(1, 2, 3)))
    assert output.gradient is None


def test_a_diverged_critic_is_named(make_trainer, tmp_path):
    """A critic that diverged is told apart from a reward that does not apply."""
    trainer = make_trainer(tmp_path, critic_learning_rate=1e6, max_steps=6)
    with pytest.raises(Exception, match=r"critic_learning_rate") as caught:
        trainer.train()
    assert caught.type.__module__ == "rdm_sdk.errors"
    assert not isinstance(caught.value, CheckpointError)
    assert isinstance(caught.value, RewardError) or "gradient norm" in str(caught.value)


def test_resuming_with_another_alpha_is_refused(make_trainer, tmp_path):
    """The same weights with another alpha are another model."""
    from peft import LoraConfig

    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, peft_config=LoraConfig(r=4, lora_alpha=4), **run).train()
    other = make_trainer(tmp_path, peft_config=LoraConfig(r=4, lora_alpha=8), max_steps=2)
    with pytest.raises(CheckpointError, match="alpha 4"):
        other.train(resume_from_checkpoint=True)
