"""Evaluating sets of rewards: what they may not return, and what happens when one raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import Brightness, latent_batch

from rdm_sdk import (
    Capabilities,
    ConfigError,
    Reward,
    RewardBatch,
    RewardError,
    RewardOutput,
)
from rdm_sdk.method.objective import normalize
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards


class Failing(Reward):
    """Returns whatever it is told to, or raises it."""

    capabilities = Capabilities()

    def __init__(self, returned: object) -> None:
        super().__init__()
        self.returned = returned

    def score(self, batch: RewardBatch) -> Any:
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.ones(5), r"one score per sample, shape \[6\]; got \[5\]"),
        (torch.ones(6, 1), r"got \[6, 1\]"),
        (torch.ones(6, dtype=torch.int64), "floating-point tensor of scores; got a tensor of torch.int64"),
        (torch.ones(6, dtype=torch.complex64), "got a tensor of torch.complex64"),
        ([1.0] * 6, "got list"),
        (None, "got NoneType"),
        (torch.tensor([1.0] * 5 + [float("inf")]), "an infinite score: 1, 1, 1, 1, 1, inf"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_nonsense_raises_under_every_policy(returned: object, words: str, on_error: Any) -> None:
    """What a reward returns is never skipped over."""
    with pytest.raises(RewardError, match=words):
        evaluate_reward(Failing(returned), latent_batch(), on_error=on_error)


@pytest.mark.parametrize("returned", [torch.full((6,), float("nan")), [None] * 6], ids=["tensor", "function"])
def test_a_reward_that_applies_to_nothing(returned: Any) -> None:
    """It raises and says what to do; under "skip" it sits the batch out."""
    reward = (
        Failing(returned) if isinstance(returned, Tensor) else as_reward(lambda images, prompts: returned, "failing")
    )
    with pytest.raises(
        RewardError, match=r"NaN .not applicable. for every sample; first prompt: 'p0'.*on_error='skip'"
    ):
        evaluate_rewards({"failing": reward}, latent_batch())
    result = evaluate_rewards({"failing": reward, "bright": Brightness()}, latent_batch(), on_error="skip")
    assert list(result.outputs) == ["bright"]
    assert list(result.skipped) == ["failing"]


def test_changing_the_images_in_place_is_caught() -> None:
    """The culprit is named before another reward judges what it left behind; lists are copies anyway."""

    def evil(images, prompts, row):
        prompts.clear()
        row.append(7)
        images.mul_(2)
        return [0.0] * len(images)

    batch = latent_batch()
    with pytest.raises(RewardError, match=r"'evil' changes its images in place.*use x [*] 2 instead"):
        evaluate_rewards({"evil": as_reward(evil), "bright": Brightness()}, batch)
    assert batch.prompts == [f"p{i // 2}" for i in range(6)]
    assert batch.columns["row"] == list(range(6))


def by_numpy(images: Tensor) -> None:
    pixels = images.detach().permute(0, 2, 3, 1).numpy()
    pixels *= 255


def by_data(images: Tensor) -> None:
    images.data[0, 0, 0, 0] = 1.0


def flipped(images: Tensor) -> None:
    images.data.copy_(images.detach().flip(3))


def without_grad(images: Tensor) -> None:
    with torch.no_grad():
        images.mul_(0.5)


@pytest.mark.parametrize("gradient", ["none", "autograd"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("edit", [by_numpy, by_data, flipped, without_grad])
def test_a_change_behind_the_version_is_caught(edit: Any, layout: torch.memory_format, gradient: Any) -> None:
    """Whatever way images are edited, whether the reward is differentiated or not, and however they lie in memory."""

    class Editing(Brightness):
        capabilities = Capabilities(gradient=gradient)

        def score(self, batch: RewardBatch) -> Tensor:
            edit(batch.images)
            return super().score(batch)

    images = torch.rand(3, 3, 9, 11).contiguous(memory_format=layout)
    with pytest.raises(RewardError, match="'editing' changes its images in place"):
        evaluate_reward(Editing(), RewardBatch.from_images(images))


@pytest.mark.parametrize("wanted", [(), None])
def test_a_reward_with_a_field_changes_nothing_either(wanted: Any) -> None:
    """Those that see the run's models judge first: what they left behind would be everybody's."""

    class Pulling(Reward):
        capabilities = Capabilities(space="latent", gradient="field")

        def field(self, batch: RewardBatch) -> RewardOutput:
            return RewardOutput(self.score(batch), batch.latents.clone())

        def score(self, batch: RewardBatch) -> Tensor:
            return batch.latents.mul_(2).flatten(1).sum(1)

    with pytest.raises(RewardError, match="'pulling' changes its latents in place"):
        evaluate_rewards({"pulling": Pulling()}, latent_batch(), gradients_of=wanted)


def test_an_exception_names_its_reward() -> None:
    """The author's exception arrives as it was raised, with a note."""
    with pytest.raises(OSError, match="no route") as caught:
        evaluate_rewards({"judge": Failing(OSError("no route"))}, latent_batch())
    assert caught.value.__notes__ == ["(raised by the reward 'judge')"]


class OwnField(Reward):
    """Has a field of its own, whatever it is told."""

    capabilities = Capabilities(space="latent", gradient="field")

    def __init__(self, returned: object) -> None:
        super().__init__()
        self.returned = returned

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.zeros(len(batch))

    def field(self, batch: RewardBatch) -> Any:
        return self.returned


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (
            RewardOutput(torch.ones(6), torch.ones(6, 3, 4)),
            r"gradient of the latents' shape \[6, 3, 4, 4\]; got \[6, 3, 4\]",
        ),
        (RewardOutput(torch.ones(6), torch.full((6, 3, 4, 4), float("nan"))), "a gradient that is not finite"),
        (torch.ones(6), "must return a RewardOutput; got Tensor"),
        (RewardOutput(torch.ones(6)), "its field.batch. returned no gradient"),
        (
            RewardOutput(torch.ones(6), torch.ones(6, 3, 4, 4), torch.ones(1)),
            r"one value per sample for its magnitude, shape \[6\]; got \[1\]",
        ),
    ],
)
def test_unusable_gradients_raise(returned: object, words: str) -> None:
    """A gradient has the latents' shape and is finite."""
    with pytest.raises(RewardError, match=words):
        evaluate_reward(OwnField(returned), latent_batch())


def test_a_field_ends_where_its_score_is_missing() -> None:
    """What a field leaves at a sample without a score moves nothing: no statistic would say how far."""
    scores = torch.tensor([1.0, torch.nan, 1.0, 1.0, torch.nan, torch.nan])
    output = evaluate_reward(OwnField(RewardOutput(scores, torch.ones(6, 3, 4, 4), torch.ones(6))), latent_batch())
    for how in ("sample", "group"):
        found = normalize({"field": output}, 2, how)["field"]
        assert found.flatten(1).amax(1).tolist() == [1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_nonsense_from_functions_raises_under_every_policy(on_error: Any) -> None:
    """Plain and asynchronous functions are held to the same."""

    async def words(images, prompts, **columns):
        return ["good"] * len(prompts)

    def none(images, prompts, **columns):
        return None

    with pytest.raises(
        RewardError, match=r"'words' must return numbers .or None., one per image; got \['good', 'good'"
    ):
        evaluate_reward(as_reward(words), latent_batch(), on_error=on_error)
    with pytest.raises(RewardError, match=r"'none' must return a list of numbers.*got NoneType"):
        evaluate_reward(as_reward(none), latent_batch(), on_error=on_error)


def test_a_declared_gradient_must_be_there() -> None:
    """Scores without a graph are told apart from scores that do not apply."""

    class Detached(Brightness):
        def score(self, batch: RewardBatch) -> Tensor:
            return super().score(batch).detach()

    with pytest.raises(
        RewardError, match="declares gradient='autograd', but its scores carry no gradient: remove no_grad"
    ):
        evaluate_reward(Detached(), latent_batch())


@pytest.mark.parametrize("wrong", [{"on_error": "Raise"}, {"gradients_of": ["brihgt"]}])
def test_misspelt_arguments_are_refused(wrong: dict[str, Any]) -> None:
    """A misspelt policy or name would silently do something else."""
    with pytest.raises(ConfigError, match=r"on_error='Raise'|gradients_of names 'brihgt'"):
        evaluate_rewards({"bright": Brightness()}, latent_batch(), **wrong)


def test_skip_leaves_a_raising_reward_out() -> None:
    """With "skip" the others go on, the exception is kept, and no score is made up."""
    rewards = {"bad": Failing(OSError("no route")), "bright": Brightness()}
    with pytest.raises(OSError, match="no route"):
        evaluate_rewards(rewards, latent_batch())
    result = evaluate_rewards(rewards, latent_batch(), on_error="skip", chunk_size=2)
    assert list(result.outputs) == ["bright"]
    assert repr(result.skipped["bad"]) == "OSError('no route')"
