"""What a plain function declares of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_rewards import latent_batch

from rdm_sdk import RewardError, declares
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards


@declares(gradient="autograd", range=(0.0, 1.0))
def bright(images: Any, prompts: Any) -> Any:
    return images.mean(dim=(1, 2, 3))


@declares(scope="group", columns=("row",))
def spread(images: Any, group_size: int, **columns: Any) -> Any:
    means = images.mean(dim=(1, 2, 3)).reshape(-1, group_size)
    return (means - means.mean(dim=1, keepdim=True)).flatten() ** 2


def test_a_function_is_differentiated() -> None:
    """Its gradient is that of its scores, and it takes that route in a run."""
    batch = latent_batch()
    output = evaluate_reward(as_reward(bright), batch)
    latents = batch.latents.clone().requires_grad_()
    bright(batch.decode(latents), None).sum().backward()
    assert output.gradient is not None
    torch.testing.assert_close(output.gradient, latents.grad)
    (found,) = resolve_rewards(bright)
    assert found.route == resolve_rewards("legibility")[0].route
    assert found.capabilities.range == (0.0, 1.0)


def test_by_its_place() -> None:
    """From YAML and a command line it declares the same."""
    (found,) = resolve_rewards("0.2*test_declares:bright")
    assert found.capabilities.gradient == "autograd"


def test_a_group() -> None:
    """It is told how large groups are, which is no column, and always sees whole ones."""
    reward = as_reward(spread)
    assert reward.capabilities.columns == ("row",)
    whole = evaluate_reward(reward, latent_batch()).scores
    torch.testing.assert_close(evaluate_reward(reward, latent_batch(), chunk_size=1).scores, whole)
    assert whole.max() > 0


def test_the_columns_it_reads() -> None:
    """Arguments without a default are needed, those with one are read; what the run gives is no column."""

    @declares(columns=("answer",), reads=("hint",))
    def judged(
        images: Any, text: Any, prompts: Any = None, answer: Any = None, *, mood: Any = "", step: Any = 0
    ) -> Any:
        return [0.0] * len(images)

    capabilities = as_reward(judged).capabilities
    assert (capabilities.columns, capabilities.reads) == (("text", "answer"), ("mood", "hint"))
    assert as_reward(spread).capabilities.reads == ()


def test_one_that_declares_nothing_is_only_scored() -> None:
    """A graph that it returns is cut."""
    reward = as_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)))
    assert reward.capabilities.gradient == "none"
    assert evaluate_reward(reward, latent_batch()).gradient is None


def test_a_promise_that_is_not_kept() -> None:
    """Numbers have no gradient."""
    numbers = declares(gradient="autograd")(lambda images, prompts: [0.0] * len(prompts))
    with pytest.raises(RewardError, match="scores carry no gradient"):
        evaluate_reward(as_reward(numbers, "numbers"), latent_batch())


WRONG = [
    ({"gradent": "autograd"}, "Did you mean 'gradient'"),
    ({"trains": "fake"}, "a function declares gradient, scope"),
    ({"gradient": "field"}, "a function is scored"),
    ({"scope": "batch"}, "must be one of 'sample', 'group'"),
    ({"columns": "answer"}, "must be a tuple of names"),
    ({"reads": "answer"}, r"reads='answer'\) must be a tuple of names: \('answer',\)"),
]


@pytest.mark.parametrize(("capabilities", "words"), WRONG)
def test_what_cannot_be_declared(capabilities: dict[str, Any], words: str) -> None:
    """It is an error where it is written."""
    with pytest.raises(RewardError, match=words):
        declares(**capabilities)


def test_an_asynchronous_function_is_only_scored() -> None:
    """Nobody differentiates what is awaited."""

    @declares(gradient="autograd")
    async def asked(images: Any, prompts: Any) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match="asynchronous"):
        as_reward(asked)


def test_the_prompts_are_called_prompts() -> None:
    """An argument `prompt` would pass for a column that every dataset has, and be given nothing."""
    with pytest.raises(RewardError, match="has an argument 'prompt', for which nothing is given"):
        as_reward(lambda images, prompt: [0.0])
