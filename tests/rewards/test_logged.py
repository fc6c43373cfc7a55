"""What a reward logs of its samples beside their scores, and the step that it is told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import latent_batch

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardError, RewardOutput, score_images
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.testing.batches import gaussian_context


def light(batch: RewardBatch) -> Tensor:
    return batch.images.mean(dim=(1, 2, 3))


def log_all(batch: RewardBatch) -> None:
    """Log a value per sample, some of them missing, and a number that is of the whole call."""
    batch.log("light", light(batch))
    batch.log("even", [None if row % 2 else float(row) for row in batch.columns["row"]])
    batch.log("step", -1 if batch.step is None else batch.step)


class Plain(Reward):
    """Differentiated by the host; for samples whose column is not None."""

    capabilities = Capabilities(gradient="autograd", columns=("row",))

    def score(self, batch: RewardBatch) -> Tensor:
        log_all(batch)
        return light(batch)


class Awaited(Reward):
    """The same, asked elsewhere."""

    capabilities = Capabilities(gradient="awaited", asynchronous=True, columns=("row",))

    async def score_async(self, batch: RewardBatch) -> Tensor:
        log_all(batch)
        return light(batch)

    async def gradient_async(self, batch: RewardBatch) -> RewardOutput:
        scores = await self.score_async(batch)
        return RewardOutput(scores, torch.full_like(batch.images, 1 / batch.images[0].numel()))


class Field(Reward):
    """One that computes its gradient itself."""

    capabilities = Capabilities(gradient="field", columns=("row",))

    def score(self, batch: RewardBatch) -> Tensor:
        log_all(batch)
        return light(batch)

    def field(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(self.score(batch), torch.ones_like(batch.latents))


def function(images: Any, row: Any, log: Any, step: Any) -> Any:
    """The same as a function."""
    log("light", images.mean(dim=(1, 2, 3)))
    log("even", [None if at % 2 else float(at) for at in row])
    log("step", -1 if step is None else step)
    return images.mean(dim=(1, 2, 3))


async def coroutine(images: Any, row: Any, log: Any, step: Any) -> Any:
    """And as one that is awaited."""
    return function(images, row, log, step)


def batch_of(rows: list[int | None], step: int | None = None, context: DiffusionContext | None = None) -> RewardBatch:
    whole = latent_batch(count=len(rows))
    return RewardBatch(
        latents=whole.latents,
        prompts=whole.prompts,
        group_size=2,
        decode=whole.decode,
        columns={"row": rows},
        step=step,
        context=context,
    )


@pytest.mark.parametrize("make", [Plain, Awaited, lambda: as_reward(function), lambda: as_reward(coroutine)])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("graded", [True, False])
def test_what_is_logged_is_of_the_samples_that_were_shown(make: Any, chunk_size: int | None, graded: bool) -> None:
    """However the batch is cut, and whoever computes; NaN stands for the others, and for what is missing."""
    batch = batch_of([0, 1, 2, None, 4, 5], step=7)
    output = evaluate_reward(make(), batch, chunk_size=chunk_size, gradients_of=None if graded else ())
    expected = light(batch)
    expected[3] = math.nan
    torch.testing.assert_close(output.logged["light"], expected, equal_nan=True)
    torch.testing.assert_close(output.scores, expected, equal_nan=True)
    assert [repr(value) for value in output.logged["even"].tolist()] == ["0.0", "nan", "2.0", "nan", "4.0", "nan"]
    assert output.logged["step"].nan_to_num(-5).tolist() == [7, 7, 7, -5, 7, 7]
    assert not any(values.requires_grad for values in output.logged.values())


def test_beside_the_gradient_that_a_reward_computes_itself() -> None:
    """Two such rewards do not log into each other's figures."""
    batch = batch_of([0, 1, 2, 3])
    batch = replace(batch, context=gaussian_context(batch.latents))
    outputs = evaluate_rewards({"one": Field(), "two": Field()}, batch).outputs
    for output in outputs.values():
        assert output.gradient is not None
        torch.testing.assert_close(output.logged["light"], light(batch))
        assert output.logged["step"].tolist() == [-1] * 4
    assert batch.logged == {}


def test_a_chunk_that_logs_nothing_has_nan() -> None:
    """Figures are those of any chunk."""

    def some(images: Any, row: Any, log: Any) -> Any:
        if row[0] == 2:
            log("late", 1)
        return [0.5] * len(images)

    logged = evaluate_reward(as_reward(some), batch_of([0, 1, 2, 3]), chunk_size=2).logged
    assert logged["late"].nan_to_num(-1).tolist() == [-1, -1, 1, 1]


def test_outside_of_any_run() -> None:
    """`score_images` returns all of what was logged, and there is no step."""
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    output = score_images(function, images, columns={"row": [0, 1]}).outputs["function"]
    assert output.logged["light"].tolist() == [0, 1]
    assert output.logged["step"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("two words", 1.0, "a figure's name is a word"),
        ("a/b", 1.0, "a figure's name is a word"),
        (3, 1.0, "a figure's name is a word"),
        ("mean", 1.0, "a run logs that of every reward"),
        ("x", [1.0, 2.0], r"one value per sample, shape \[4\]; got \[2\]"),
        ("x", torch.zeros(4, 1), r"shape \[4\]; got \[4, 1\]"),
        ("x", "much", "takes numbers; got 'much'"),
        ("x", ["a"] * 4, "takes numbers"),
        ("x", math.inf, "an infinite number"),
    ],
)
def test_what_cannot_be_logged(name: Any, values: Any, words: str) -> None:
    """A RewardError that says why."""

    def careless(images: Any, log: Any) -> Any:
        log(name, values)
        return [0.0] * len(images)

    with pytest.raises(RewardError, match=words):
        evaluate_reward(as_reward(careless), batch_of([0, 1, 2, 3]))


def test_a_part_of_a_batch_cannot_log() -> None:
    """Nobody would read it, so it says so; the batch itself can, as often as one likes."""
    batch = batch_of([0, 1, 2, 3])
    for part in [*batch.split(2), batch.select([0])]:
        with pytest.raises(RewardError, match="call it on the batch that you got"):
            part.log("x", 1)
    for value in (1, 2):
        batch.with_images(batch.images).log("x", value)
    assert batch.logged is not None
    assert batch.logged["x"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["step", "log"])
def test_a_column_of_that_name_is_no_argument(name: str) -> None:
    """Where both are there, nothing is guessed; a function without the argument gets its column."""
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(RewardError, match=f"has an argument '{name}', which is the run's"):
        score_images(function, images, columns={"row": [0, 1], name: [1, 2]})
    seen: dict[str, Any] = {}

    def takes_columns(images: Any, prompts: Any, **columns: Any) -> Any:
        seen.update(columns)
        return [0.0] * len(images)

    score_images(takes_columns, images, columns={name: [1, 2]})
    assert seen == {name: [1, 2]}
