"""Small promises of the reward contract."""

import numpy as np
import pytest
import torch

from rdm_sdk import Capabilities, CheckpointError, Reward, RewardError, RewardOutput
from rdm_sdk.method.groups import constant_groups
from rdm_sdk.method.objective import combine, normalize
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.callables import CallableReward
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards


def batch(count: int = 4) -> RewardBatch:
    """Return a batch whose images are its latents, three times."""
    latents = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return RewardBatch(
        latents=latents, prompts=["a seven"] * count, group_size=2, decode=lambda z: z.expand(-1, 3, -1, -1)
    )


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


def test_a_function_gets_the_columns_that_it_takes():
    """With **columns it gets all; without, those in its signature, and those without a default are required."""
    full = RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["a", "b"], columns={"size": [1, 2], "other": [3, 4]})

    def named(images, size, prompts=None, weight=2.0):
        return [weight * value for value in size]

    reward = CallableReward(named)
    assert reward.capabilities.columns == ("size",)
    assert evaluate_reward(reward, full).scores.tolist() == [2.0, 4.0]

    def everything(images, prompts, **columns):
        return columns["other"]

    assert evaluate_reward(CallableReward(everything), full).scores.tolist() == [3.0, 4.0]
    assert CallableReward(everything).capabilities.columns == ()


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"space": "pixels"}, r"space='pixels'.*one of 'pixel', 'latent'. Did you mean 'pixel'"),
        ({"gradient": True}, "gradient=True"),
        ({"scope": "groups"}, "Did you mean 'group'"),
        ({"dtype": "fp16"}, "dtype='fp16'"),
        ({"columns": "caption"}, r"must be a tuple of names: \('caption',\)"),
        ({"asynchronous": True, "gradient": "autograd"}, "only scored; declare gradient='none'"),
        ({"dtype": "float16", "gradient": "autograd"}, "underflow in float16"),
        ({"range": (1, 0)}, "must be .low, high. or None"),
        ({"range": 5}, r"range=5\) cannot be used; it must be .low, high. or None"),
        ({"range": ("0", "1")}, "must be .low, high. or None"),
        ({"parameters": "7B"}, r"parameters='7B'\) cannot be used; it must be a whole number, 0 or more, or None"),
        ({"parameters": -1}, "a whole number, 0 or more"),
        ({"stochastic": "false"}, r"stochastic='false'\) cannot be used; it must be True or False"),
        ({"prompts": 1}, "prompts=1.* True or False"),
        ({"context": True, "gradient": "autograd"}, "declare gradient='field' and return the gradient from field"),
        ({"context": True, "asynchronous": True}, "not awaited; write score"),
    ],
)
def test_capabilities_are_checked(declared, words):
    """A misspelt declaration would be ignored silently otherwise."""
    with pytest.raises(RewardError, match=words):
        Capabilities(**declared)


class Silent(Reward):
    """Declares, and writes nothing."""

    capabilities = Capabilities()


class Unclear(Reward):
    """Declares nothing."""

    def score(self, batch):
        return batch.images.mean(dim=(1, 2, 3))


class Bare(Unclear):
    """Forgets its parent."""

    capabilities = Capabilities()

    def __init__(self):
        self.model = None


class Odd(Unclear):
    """Its options are no RewardConfig."""

    capabilities = Capabilities()

    class Config:
        radius = 1


class Waiting(Reward):
    """Asynchronous, with nothing but `score_async`."""

    capabilities = Capabilities(asynchronous=True)

    async def score_async(self, batch):
        return batch.images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Silent, r"Silent must write score\(self, batch\)"),
        (Unclear, r"Unclear must have a class attribute capabilities = Capabilities\(...\)"),
        (Odd, "Odd.Config must be a subclass of rdm_sdk.RewardConfig"),
        (lambda: resolve_rewards(Bare()), r"Bare.__init__ must call super\(\).__init__\(\)"),
        (lambda: resolve_rewards(Waiting), r"pass Waiting\(\) instead of Waiting"),
        (lambda: Waiting().score(None), "score_async.batch. is to be awaited"),
    ],
)
def test_unusable_classes_are_refused(make, words):
    """What a subclass forgot is said by its name."""
    with pytest.raises(RewardError, match=words):
        make()


def test_a_config_and_options_together_are_refused():
    """One of them would be dropped."""
    from rdm_sdk.digits.reward import Legibility

    with pytest.raises(RewardError, match="a config or options, not both; got radius too"):
        Reward.__init__(Legibility(), Legibility.Config(), radius=5)


def test_inapplicable_samples_are_in_no_statistic():
    """A NaN score's gradient does not count in the group's scale, and an all-NaN group gives nothing."""
    scores = torch.tensor([1.0, float("nan"), float("nan"), float("nan")])
    gradient = torch.tensor([2.0, 0.0, 0.0, 0.0]).reshape(4, 1)
    for normalization in ("group", "sample"):
        fields = normalize({"r": RewardOutput(scores, gradient)}, 2, normalization)
        field = combine(fields, {"r": 1.0})
        assert field.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert constant_groups(torch.tensor([1.0, float("nan"), 1.0, 2.0]), 2).tolist() == [True, False]


def test_resuming_with_another_variant_is_refused(make_trainer, tmp_path):
    """Another option of a reward is another reward."""
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, "dm + jpeg[quality=80]", **run).train()
    with pytest.raises(CheckpointError, match="quality=80"):
        make_trainer(tmp_path, "dm + jpeg[quality=90]", max_steps=2).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, "dm + 0.5*jpeg[quality=80]", max_steps=2).train(resume_from_checkpoint=True)


def test_an_asynchronous_class_needs_no_score():
    """`score_async` is enough."""
    images = torch.rand(3, 3, 8, 8)
    scores = evaluate_reward(Waiting(), RewardBatch.from_images(images)).scores
    assert torch.equal(scores, images.mean(dim=(1, 2, 3)))


def test_models_in_lists_and_dicts_are_moved():
    """The host finds modules one level deep."""

    class Nested(Unclear):
        capabilities = Capabilities()

        def __init__(self):
            super().__init__()
            self.listed, self.named = [torch.nn.Linear(1, 1)], {"a": torch.nn.Linear(1, 1)}

    reward = Nested()
    reward.to("meta")
    assert reward.listed[0].weight.device.type == reward.named["a"].weight.device.type == "meta"
