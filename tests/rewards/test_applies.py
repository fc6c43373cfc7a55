"""Rewards that are for some samples of a batch: they see those and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import Brightness, latent_batch

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardError, RewardOutput, score_images
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards

TEXTS: list[object] = ["a", "a", None, None, "b", "b"]
ROWS = [0, 1, 4, 5]


def batch(texts: Sequence[object] = TEXTS, decoded: list[int] | None = None) -> RewardBatch:
    made = latent_batch(decoded)
    return RewardBatch(
        latents=made.latents,
        prompts=made.prompts,
        group_size=made.group_size,
        decode=made.decode,
        columns={"text": list(texts), "row": list(range(6))},
    )


class Written(Brightness):
    """Brightness of the samples with a text; takes down what it was shown."""

    capabilities = Capabilities(gradient="autograd", columns=("text",))

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def score(self, batch: RewardBatch) -> Tensor:
        self.seen += batch.columns["row"]
        assert len(batch.images) == len(batch.latents) == len(batch.prompts) == len(batch.columns["text"])
        assert None not in batch.columns["text"]
        return super().score(batch)


class WrittenLatents(Written):
    """The same of latents."""

    capabilities = Capabilities(space="latent", gradient="autograd", columns=("text",))

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.latents.sin().mean(dim=(1, 2, 3))


class Spread(Written):
    """Compares the samples of a prompt."""

    capabilities = Capabilities(scope="group", gradient="autograd", columns=("text",))

    def score(self, batch: RewardBatch) -> Tensor:
        grouped = super().score(batch).reshape(-1, batch.group_size)
        return (grouped - grouped.mean(1, keepdim=True)).abs().flatten()


def scored(images: Tensor, prompts: list[str], text: list[str]) -> Tensor:
    """A function that cannot do without a column."""
    assert len(text) == len(images) == len(prompts)
    return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(one)) for one in text])


async def awaited(images: Tensor, prompts: list[str], text: list[str]) -> Tensor:
    """The same, awaited."""
    return scored(images, prompts, text)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "make",
    [Written, WrittenLatents, Spread, lambda: as_reward(scored), lambda: as_reward(awaited)],
    ids=["pixels", "latents", "group", "function", "awaited"],
)
def test_only_its_samples_are_shown(make: Any, chunk_size: int | None) -> None:
    """Scores and gradients are those of a batch without the others, which have NaN and no gradient."""
    reward = make()
    result = evaluate_rewards({"some": reward, "all": Brightness()}, batch(), chunk_size=chunk_size)
    some, alone = result.outputs["some"], evaluate_reward(reward, batch().select(ROWS))
    assert result.shown == {"some": 4, "all": 6}
    assert some.scores[[2, 3]].isnan().all()
    assert torch.equal(some.scores[ROWS], alone.scores)
    if alone.gradient is not None:
        assert some.gradient is not None
        torch.testing.assert_close(some.gradient[ROWS], alone.gradient)
        assert not some.gradient[[2, 3]].any()
        assert alone.gradient.any()
    assert torch.equal(result.outputs["all"].scores, evaluate_reward(Brightness(), batch()).scores)


@pytest.mark.parametrize("beside", [{"bright": Brightness()}, {}])
def test_images_are_decoded_once(beside: dict[str, Reward]) -> None:
    """A reward that sees a part of the images takes it from those that were decoded for all, or for gradients."""
    decoded: list[int] = []
    written = Written()
    evaluate_rewards(beside | {"written": written}, batch(decoded=decoded))
    assert decoded == [6]
    assert written.seen == ROWS


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("make", [Written, lambda: as_reward(scored), lambda: as_reward(awaited)])
def test_a_batch_without_its_samples(make: Any, on_error: Any) -> None:
    """The reward is not asked, nothing is decoded for it, and it is no error under any policy: NaN for all."""
    decoded: list[int] = []
    result = evaluate_rewards({"some": make()}, batch([None] * 6, decoded), on_error=on_error)
    output = result.outputs["some"]
    assert output.scores.isnan().all()
    assert output.gradient is None or not output.gradient.any()
    assert decoded == []
    assert result.skipped == {}
    assert result.shown == {"some": 0}


def test_finished_images() -> None:
    """`score_images` follows the same rule."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = score_images([scored], images, columns={"text": ["a", None, "abc"]}).outputs["scored"].scores
    assert scores.isnan().tolist() == [False, True, False]


class Answering(Reward):
    """Says of itself what it is for, and returns NaN where it is told to."""

    capabilities = Capabilities()

    def __init__(self, answer: object, scores: float = 1.0) -> None:
        super().__init__()
        self.answer, self.value = answer, scores

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [prompt == self.answer for prompt in prompts] if isinstance(self.answer, str) else self.answer

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.full((len(batch),), self.value)


def test_by_prompt() -> None:
    """A reward can tell by the prompts."""
    output = evaluate_reward(Answering("p1"), batch())
    assert output.scores.tolist() == pytest.approx([torch.nan] * 2 + [1] * 2 + [torch.nan] * 2, nan_ok=True)


def test_nan_for_all_it_was_shown() -> None:
    """That is suspicious and stays an error, unless the reward may sit out; a diverged critic never may."""
    reward = Answering("p1", torch.nan)
    with pytest.raises(RewardError, match=r"NaN .not applicable. for every sample.*or by applies\(\)"):
        evaluate_rewards({"nan": reward}, batch())
    result = evaluate_rewards({"nan": reward}, batch(), may_sit_out=["nan"])
    assert result.outputs["nan"].scores.isnan().all()

    class Diverged(Answering):
        capabilities = Capabilities(trains="fake")

        def training_loss(self, batch: RewardBatch) -> Tensor:
            return torch.zeros(())

    with pytest.raises(RewardError, match="has diverged"):
        evaluate_rewards({"nan": Diverged("p1", torch.nan)}, batch(), may_sit_out=["nan"])


class Elsewhere(Reward):
    """Is told by whoever scores which samples it was for, and their scores."""

    capabilities = Capabilities(asynchronous=True, gradient="awaited")

    def __init__(self, applies: Any, score: float = 1.0) -> None:
        super().__init__()
        self.told, self.value = applies, score

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        if not isinstance(self.told, str):
            return RewardOutput(torch.ones(len(batch)), torch.ones_like(batch.images), applies=self.told)
        applies = torch.tensor([prompt == self.told for prompt in batch.prompts])
        scores = torch.where(applies, self.value, torch.nan)
        return RewardOutput(scores, torch.ones_like(batch.images), applies=applies)

    async def score_async(self, batch: RewardBatch) -> RewardOutput:
        return await self.gradient_async(batch)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4])
@pytest.mark.parametrize("graded", [None, ()])
def test_whoever_scores_may_tell(chunk_size: int | None, graded: Any) -> None:
    """What it was not for counts as not shown: none at all is no error, NaN for all of the others is one."""
    options: dict[str, Any] = {"chunk_size": chunk_size, "gradients_of": graded}
    result = evaluate_rewards({"some": Elsewhere("p1")}, batch(), **options)
    output = result.outputs["some"]
    assert result.shown == {"some": 2}
    assert output.scores.isnan().tolist() == [True, True, False, False, True, True]
    assert output.applies is not None
    assert output.applies.tolist() == [False, False, True, True, False, False]
    if graded is None:
        assert output.gradient is not None
        assert output.gradient.flatten(1).any(1).tolist() == output.applies.tolist()
    result = evaluate_rewards({"none": Elsewhere("p9")}, batch(), **options)
    assert result.outputs["none"].scores.isnan().all()
    assert result.shown == {"none": 0}
    with pytest.raises(RewardError, match=r"NaN .not applicable. for every sample"):
        evaluate_rewards({"nan": Elsewhere("p1", torch.nan)}, batch(), **options)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([True] * 6, "one True or False per sample, .* got list"),
        (torch.ones(6), r"a bool tensor of shape \[6\]; got \[6\] torch.float32"),
        (torch.ones(5, dtype=torch.bool), r"got \[5\] torch.bool"),
        (torch.tensor([True] * 5 + [False]), "has scores for samples that it says it was not for"),
    ],
)
@pytest.mark.parametrize("graded", [None, ()])
def test_what_it_tells_is_checked(told: Any, words: str, graded: Any) -> None:
    """Nonsense is an error under every policy."""
    with pytest.raises(RewardError, match=words):
        evaluate_rewards({"some": Elsewhere(told)}, batch(), on_error="skip", gradients_of=graded)


@pytest.mark.parametrize("make", [Written, Spread, lambda: as_reward(scored), lambda: as_reward(awaited)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_outputs_say_which_samples_a_reward_was_for(make: Any, chunk_size: int | None) -> None:
    """Whether it is differentiated, scored or awaited; a part of an output knows its own."""
    for texts in (TEXTS, [None] * 6):
        output = evaluate_reward(make(), batch(texts), chunk_size=chunk_size)
        assert output.applies is not None
        assert output.applies.tolist() == [text is not None for text in texts]
        part = output.part(slice(1, 3)).applies
        assert part is not None
        assert part.tolist() == [text is not None for text in texts[1:3]]


@pytest.mark.parametrize("answer", [[True] * 5, torch.ones(6, dtype=torch.bool), [1.0] * 6, None])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_answer_that_is_none(answer: object, on_error: Any) -> None:
    """Anything but one truth per sample is an error under every policy."""
    with pytest.raises(RewardError, match=r"'answering': applies.* must return a list of 6 times True or False"):
        evaluate_rewards({"some": Answering(answer)}, batch(), on_error=on_error)


def test_a_part_of_a_group() -> None:
    """A reward that compares the samples of a prompt is for all of them or none."""
    with pytest.raises(RewardError, match=r"'spread' compares the samples of one prompt.* same of all 2"):
        evaluate_reward(Spread(), batch(["a", None, None, None, "b", "b"]))


def test_an_exception_in_applies_follows_the_policy() -> None:
    """As one in `score` does."""
    rewards = {"bad": Answering(OSError("no list")), "bright": Brightness()}
    with pytest.raises(OSError, match="no list"):
        evaluate_rewards(rewards, batch())
    assert list(evaluate_rewards(rewards, batch(), on_error="skip", chunk_size=2).outputs) == ["bright"]


def test_selected_rows() -> None:
    """`select` takes latents, prompts, columns, weights and decoded images along, in the order asked for."""
    decoded: list[int] = []
    whole = batch(decoded=decoded)
    whole = RewardBatch(
        **{name: getattr(whole, name) for name in ("latents", "prompts", "group_size", "decode", "columns")},
        weights=torch.arange(6.0),
    )
    images = whole.images
    part = whole.select([5, 0])
    assert torch.equal(part.images, images[[5, 0]])
    assert torch.equal(part.latents, whole.latents[[5, 0]])
    assert part.prompts == ["p2", "p0"]
    assert part.columns == {"text": ["b", "a"], "row": [5, 0]}
    assert part.weights is not None
    assert part.weights.tolist() == [5, 0]
    assert decoded == [6]
