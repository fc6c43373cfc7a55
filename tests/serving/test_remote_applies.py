"""Rewards that are for some samples, and columns that a reward can do without: served as in the run's own process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from live_servers import Faulty, remote, serving
from torch import Tensor

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, RewardError, RewardOutput, declares, score_images
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving.answers import described_capabilities
from rdm_sdk.serving.asking import PatientConfig
from rdm_sdk.serving.client import Client
from rdm_sdk.serving.remote import Remote
from rdm_sdk.serving.requests import Request
from rdm_sdk.serving.scorer import Scorer

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NONE = ["a fox"] * 6
SOME = ["a fox", "a sign", "a sign", "a fox", "a fox", "a sign"]
BLANK = ["a blank sign"] * 6


class Signs(Reward):
    """How bright a sign is; it is for signs alone, and cannot read blank ones."""

    name = "signs"
    capabilities = Capabilities(gradient="autograd", prompts=True)

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        return ["sign" in prompt for prompt in prompts]

    def score(self, batch: RewardBatch) -> Tensor:
        blank = torch.tensor(["blank" in prompt for prompt in batch.prompts])
        batch.log("light", batch.images.mean(dim=(1, 2, 3)))
        return (batch.images**2).mean(dim=(1, 2, 3)).masked_fill(blank, torch.nan)


class OddDigits(Legibility):
    """Legibility of every second digit."""

    name = "odd"

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        return [any(word in prompt for word in ("one", "three", "five", "seven", "nine")) for prompt in prompts]


class TwoHeads(Reward):
    """A head of two outputs, of which one counts: a view of every second number."""

    name = "heads"
    capabilities = Capabilities(gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        batch.log("threshold", 0.5)
        return batch.images.mean(dim=(2, 3))[:, :2][:, 0]


@pytest.fixture(scope="module")
def signs() -> Iterator[Remote]:
    """Signs behind a server, which is behind another one."""
    with serving([Signs()]) as inner, serving([Remote(url=inner.url)]) as outer:
        yield Remote(url=outer.url)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("graded", [None, ()])
@pytest.mark.parametrize("prompts", [SOME, NONE])
def test_it_is_for_what_the_local_one_is_for(signs: Remote, prompts: list[str], graded: Any, chunk_size: Any) -> None:
    """Scores, gradients, what is logged and how many were shown; a batch that it is for none of is normal."""
    batch = RewardBatch.from_images(IMAGES, prompts)
    local, distant = (
        evaluate_rewards({"r": one}, batch, gradients_of=graded, chunk_size=chunk_size) for one in (Signs(), signs)
    )
    assert distant.shown == local.shown == {"r": prompts.count("a sign")}
    ours, theirs = distant.outputs["r"], local.outputs["r"]
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=0, atol=0)
    assert ours.applies is not None
    assert ours.applies.tolist() == [prompt == "a sign" for prompt in prompts]
    for name, values in theirs.logged.items():
        torch.testing.assert_close(ours.logged[name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prompts", [BLANK, ["a fox", *BLANK[1:]]])
def test_nan_for_what_it_was_shown_stays_an_error(signs: Remote, prompts: list[str]) -> None:
    """As it is of the reward itself."""
    for reward in (Signs(), signs):
        with pytest.raises(RewardError, match=r"NaN .not applicable. for every sample"):
            evaluate_reward(reward, RewardBatch.from_images(IMAGES, prompts))


@pytest.mark.usefixtures("sound")
def test_an_older_server_does_not_say(server: Faulty) -> None:
    """What it answers counts as shown, so NaN for all is an error as before."""
    reward = remote(server)
    server.fault = "all NaN"
    with pytest.raises(RewardError, match=r"NaN .not applicable. for every sample"):
        evaluate_reward(reward, Legibility().example())


def test_a_score_where_it_does_not_apply_is_nonsense(signs: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that contradicts itself is not believed."""
    told = RewardOutput(torch.ones(6), applies=torch.zeros(6, dtype=torch.bool))

    async def ask(*given: Any) -> RewardOutput:
        return told

    monkeypatch.setattr(signs.client, "ask", ask)
    with pytest.raises(RewardError, match="has scores for samples that it says it was not for"):
        evaluate_reward(signs, RewardBatch.from_images(IMAGES, SOME), on_error="skip", gradients_of=())


def test_requests_that_are_judged_together_are_told_apart() -> None:
    """Each is told of its own samples."""
    scorer = Scorer(resolve_rewards([Signs()]), "cpu", batch_size=4)
    try:
        requests = [Request(IMAGES[:2], prompts=SOME[start : start + 2]) for start in (0, 2, 4)]
        with scorer._changed:  # so that nothing is taken before all of it waits
            futures = [scorer.submit(request, False) for request in requests]
        told = [future.result()["signs"].applies for future in futures]
    finally:
        scorer.close()
    assert [one is not None and one.tolist() for one in told] == [[False, True], [True, False], [False, True]]


def test_a_run_is_the_local_run(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, losses_of: Callable[..., Any]
) -> None:
    """Prompts of two kinds: steps without any of its samples are normal, log `/applies` of 0 and no mean."""
    data, rows = Dataset.from_dict({"prompt": ["one", "two", "three", "four"]}), {}
    settings = {"prompts": data, "max_steps": 4, "per_device_train_batch_size": 2, "num_generations": 2}
    with serving([OddDigits()]) as app:
        for name, reward in (("odd", OddDigits()), ("remote", f'remote[url="{app.url}"]')):
            trainer = make_trainer(tmp_path / name, ["dm", (reward, 0.1)], **settings)
            trainer.train()
            kept = [{k: v for k, v in row.items() if k.split("/")[0] != "timings"} for row in losses_of(trainer)]
            rows[name] = [{k.replace(name, "it"): v for k, v in row.items()} for row in kept]
    assert sorted(row["rewards/it/applies"] for row in rows["remote"]) == [0, 0, 1, 1]
    assert all(("rewards/it/mean" in row) == bool(row["rewards/it/applies"]) for row in rows["remote"])
    assert rows["remote"] == rows["odd"]


@pytest.mark.parametrize("graded", [None, ()])
def test_one_image(graded: Any) -> None:
    """Scores that are a view, and a number that was logged, travel from a batch of one."""
    batch = RewardBatch.from_images(IMAGES[:1])
    with serving([TwoHeads()]) as app:
        ours = evaluate_reward(Remote(url=app.url), batch, gradients_of=graded)
    assert torch.equal(ours.scores, TwoHeads().score(batch))
    assert ours.logged["threshold"].tolist() == [0.5]


# ---- Columns that it can do without ---------------------------------------------------------------------------------


def named(images: Tensor, prompts: list[str], text: Any = None) -> list[float]:
    """Which samples have a text, -1 where nobody says."""
    return [-1.0] * len(images) if text is None else [float(entry is not None) for entry in text]


@declares(reads=("mood",))
def counting(images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
    """How many columns there are."""
    return [float(len(columns))] * len(images)


def test_columns_that_it_reads_are_sent() -> None:
    """Where the batch has them, None included; what the reward does not read stays here."""
    with serving([named]) as app:
        made = Remote(url=app.url)
        assert (made.capabilities.columns, made.capabilities.reads) == ((), ("text",))
        for columns in (None, {"text": ["a", None, "", "b", None, "c"], "row": [object()] * 6}):
            here, there = (score_images(one, IMAGES, columns=columns).outputs for one in (named, made))
            assert there["remote"].scores.tolist() == here["named"].scores.tolist()
        with pytest.raises(RewardError, match=r"reads the column 'text', which holds object; only .*can do without"):
            score_images(made, IMAGES, columns={"text": ["a", *[object()] * 5]})
    with serving([counting]) as app:
        columns = {"mood": list("abcdef"), "row": list(range(6))}
        assert score_images(Remote(url=app.url), IMAGES, columns=columns).outputs["remote"].scores.tolist() == [1.0] * 6


def test_an_older_server_names_no_columns_that_it_reads() -> None:
    """It is sent those that its reward needs, as before."""
    entry = {"capabilities": described_capabilities(Capabilities(columns=("a",))), "provenance": {}}
    told = {"version": 1, "rewards": {"x": entry}, "limits": {"body": 1, "images": 1, "side": 1}}
    client = Client(["http://judge"], PatientConfig())
    capabilities = client._read_description("http://judge", bytearray(json.dumps(told).encode()), None).capabilities
    assert (capabilities.columns, capabilities.reads) == (("a",), ())
