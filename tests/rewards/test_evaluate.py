"""Evaluating sets of rewards: decoded once, in chunks, with gradients where they are wanted; and finished images."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import Brightness, count_ink, latent_batch

from rdm_sdk import (
    Capabilities,
    Reward,
    RewardBatch,
    RewardError,
    score_images,
)
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.testing import example_images


class LatentNorm(Reward):
    """Minus the squared norm of the latents."""

    capabilities = Capabilities(space="latent", gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return -batch.latents.square().sum(dim=(1, 2, 3))


class Spread(Reward):
    """How far an image's brightness is from its group's mean."""

    capabilities = Capabilities(scope="group")

    def score(self, batch: RewardBatch) -> Tensor:
        grouped = batch.images.mean(dim=(1, 2, 3)).reshape(-1, batch.group_size)
        return (grouped - grouped.mean(1, keepdim=True)).abs().flatten()


def every_kind() -> dict[str, Reward]:
    """One reward of each kind."""
    return {"bright": Brightness(power=2.0), "norm": LatentNorm(), "spread": Spread(), "ink": as_reward(count_ink)}


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 6, 100])
def test_chunked_equals_unchunked(chunk_size: int) -> None:
    """Scores and gradients do not depend on the chunks; whole groups stay together."""
    whole = evaluate_rewards(every_kind(), latent_batch()).outputs
    parts = evaluate_rewards(every_kind(), latent_batch(), chunk_size=chunk_size).outputs
    for name in whole:
        assert torch.allclose(parts[name].scores, whole[name].scores, atol=1e-6)
        if whole[name].gradient is None:
            assert parts[name].gradient is None
        else:
            assert torch.allclose(parts[name].gradient, whole[name].gradient, atol=1e-6)


def test_scores_without_a_gradient_keep_no_graph() -> None:
    """Also of a reward whose own weights would ask for one."""
    recorded: list[bool] = []

    class Scorer(Reward):
        capabilities = Capabilities(space="latent")

        def score(self, batch: RewardBatch) -> Tensor:
            recorded.append(torch.is_grad_enabled())
            return batch.latents.mean(dim=(1, 2, 3)) * torch.nn.Parameter(torch.ones(()))

    scores = evaluate_reward(Scorer(), latent_batch()).scores
    assert recorded == [False]
    assert not scores.requires_grad


def test_gradient_is_that_of_the_whole_chain() -> None:
    """The gradient with respect to the latents equals back-propagation through decoder and reward."""
    batch = latent_batch()
    leaf = batch.latents.clone().requires_grad_()
    (expected,) = torch.autograd.grad((batch.decode(leaf) ** 2).mean(dim=(1, 2, 3)).sum(), leaf)
    found = evaluate_reward(Brightness(power=2.0), batch).gradient
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_images_are_decoded_once_and_only_if_asked_for(chunk_size: int | None) -> None:
    """Each sample is decoded once for all rewards, whatever their order; latent rewards decode nothing."""
    for names in (["ink", "bright", "spread"], ["bright", "ink"], ["ink", "spread"]):
        decoded: list[int] = []
        evaluate_rewards({n: every_kind()[n] for n in names}, latent_batch(decoded), chunk_size=chunk_size)
        assert sum(decoded) == 6, names
    decoded = []
    evaluate_rewards({"norm": LatentNorm()}, latent_batch(decoded), chunk_size=chunk_size)
    assert decoded == []


def test_gradients_are_taken_only_where_they_are_wanted() -> None:
    """Of the other rewards there are scores; without any wanted gradient, nothing is decoded with a graph."""
    outputs = evaluate_rewards(every_kind(), latent_batch(), gradients_of=["norm"]).outputs
    assert [name for name, output in outputs.items() if output.gradient is not None] == ["norm"]
    plain, tracked = latent_batch(), []

    def decode(z: Tensor) -> Tensor:
        tracked.append(z.requires_grad)
        return plain.decode(z)

    batch = replace(plain, decode=decode)
    evaluate_rewards(every_kind(), batch, gradients_of=["norm"])
    assert not batch.images.requires_grad
    assert tracked == [False]


def test_a_chunk_is_let_go_before_the_next_is_decoded() -> None:
    """Memory holds the images and the graph of one chunk, however large the batch is."""
    decoded: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def decode(z: Tensor) -> Tensor:
        alive.append(sum(images() is not None for images in decoded))
        images = z.sigmoid()
        decoded.append(weakref.ref(images))
        return images

    batch = replace(latent_batch(), decode=decode)
    evaluate_rewards({"bright": Brightness(), "ink": as_reward(count_ink)}, batch, chunk_size=2)
    assert alive == [0, 0, 0]


def test_columns_and_prompts_go_with_their_samples() -> None:
    """In chunks, each function call sees its own rows."""
    seen: list[tuple[list[str], list[Any]]] = []

    def watch(images, prompts, row):
        seen.append((prompts, row))
        return row

    scores = evaluate_reward(as_reward(watch), latent_batch(), chunk_size=4).scores
    assert seen == [(["p0", "p0", "p1", "p1"], [0, 1, 2, 3]), (["p2", "p2"], [4, 5])]
    assert scores.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_declared_dtype_is_handed_over() -> None:
    """Images arrive in the dtype that the reward declares; scores and gradients come back in float32."""

    class Half(Brightness):
        capabilities = Capabilities(gradient="autograd", dtype="bfloat16")

        def score(self, batch: RewardBatch) -> Tensor:
            assert batch.images.dtype == torch.bfloat16
            return super().score(batch)

    output = evaluate_reward(Half(), latent_batch())
    assert output.gradient is not None
    assert (output.scores.dtype, output.gradient.dtype) == (torch.float32, torch.float32)


def test_nothing_hangs_on_the_result() -> None:
    """Outputs carry no graph, and the latents get no gradient."""
    batch = latent_batch()
    for output in evaluate_rewards(every_kind(), batch).outputs.values():
        assert not output.scores.requires_grad
        assert output.gradient is None or not output.gradient.requires_grad
    assert batch.latents.grad is None
    assert not batch.latents.requires_grad


def test_offload_moves_the_models_back() -> None:
    """Models are where they are needed while they are needed, even if a reward raises."""
    moves: list[str] = []

    class Watched(Brightness):
        def to(self, device: torch.device | str) -> None:
            moves.append(str(device))

        def score(self, batch: RewardBatch) -> Tensor:
            moves.append("score")
            return super().score(batch)

    evaluate_rewards({"a": Watched()}, latent_batch(), offload=True, device="cpu")
    assert moves == ["cpu", "score", "cpu"]

    class Raising(Watched):
        def score(self, batch: RewardBatch) -> Tensor:
            raise OSError("gone")

    moves.clear()
    with pytest.raises(OSError, match="gone"):
        evaluate_rewards({"a": Raising()}, latent_batch(), offload=True)
    assert moves == ["cpu", "cpu"]


def test_a_partly_inapplicable_reward() -> None:
    """None is NaN, has no gradient, and touches no other sample; a chunk of nothing but NaN is fine."""

    def some(images, prompts, **columns):
        return [None if prompt == "p0" else 1.0 for prompt in prompts]

    scores = evaluate_reward(as_reward(some), latent_batch(), chunk_size=2).scores
    assert scores.isnan().tolist() == [True, True, False, False, False, False]

    class Partly(Brightness):
        def score(self, batch: RewardBatch) -> Tensor:
            if batch.prompts[0] == "p0" and len(batch) == 2:
                return torch.full((2,), float("nan"))
            return super().score(batch).masked_fill(torch.tensor([p == "p0" for p in batch.prompts]), float("nan"))

    output = evaluate_reward(Partly(), latent_batch(), chunk_size=2)
    assert output.gradient is not None
    assert not output.gradient[:2].any()
    assert output.gradient[2:].any()
    assert torch.equal(output.gradient, evaluate_reward(Partly(), latent_batch()).gradient)


def test_a_score_that_became_nan_has_no_gradient() -> None:
    """One sample's 0/0 does not reach the others, or stop the run."""

    class Quotient(Brightness):
        def score(self, batch: RewardBatch) -> Tensor:
            bad = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
            return super().score(batch) * bad / bad

    output = evaluate_reward(Quotient(), latent_batch())
    sound = evaluate_reward(Brightness(), latent_batch())
    assert output.gradient is not None
    assert sound.gradient is not None
    assert output.scores.isnan().tolist() == [False, True, False, False, False, False]
    assert not output.gradient[1].any()
    assert torch.allclose(output.gradient[2:], sound.gradient[2:])


# ---- Times and provenance -----------------------------------------------------------------------------------------


def test_times_and_provenance() -> None:
    """Each reward has its time, and what its scores must be stored with."""
    result = evaluate_rewards({"bright": Brightness(power=3.0)}, latent_batch())
    assert result.seconds["bright"] > 0
    stored = result.provenance["bright"]
    assert stored["reward"] == "brightness"
    assert stored["options"] == {"power": 3.0}
    assert stored["origin"] == Brightness.__module__
    assert stored.keys() >= {"preprocessing", "sdk_version"}


# ---- Finished images ----------------------------------------------------------------------------------------------


def test_score_images() -> None:
    """Any rewards on any images, without training."""
    images = example_images(4)
    result = score_images([Brightness(), "jpeg"], images, batch_size=3)
    assert torch.allclose(result.outputs["brightness"].scores, images.mean(dim=(1, 2, 3)))
    assert (result.outputs["jpeg"].scores < 0).all()
    assert result.outputs["brightness"].gradient is None
    assert result.provenance["jpeg"]["options"] == {"quality": 95}
    assert result.provenance["jpeg"]["origin"] == "rdm-reward-jpeg 0.1.0"


@pytest.mark.parametrize(
    ("rewards", "images", "prompts", "words"),
    [
        ("jpeg", torch.rand(2, 3, 8, 8) * 255, None, r"must lie in \[0, 1\].*Divide 8-bit images by 255"),
        ("jpeg", torch.rand(2, 8, 8, 3), None, r"\[N, 3, H, W\].*got \[2, 8, 8, 3\]"),
        ("jpeg", torch.rand(2, 3, 8, 8), ["a"], "2 images do not go with 1 prompts"),
        ("jpeg", [[0.5]], None, "got list"),
        ("jpeg", torch.rand(0, 3, 8, 8), None, "at least one image"),
        ("legibility", torch.rand(2, 3, 8, 8), None, "'legibility' reads prompts; pass one per image"),
        (
            lambda images, caption: [0.0],
            torch.rand(2, 3, 8, 8),
            None,
            "needs a column 'caption' beside the images, .*: score_images takes it as an entry of columns",
        ),
        (Spread(), torch.rand(2, 3, 8, 8), None, "one of each .* a group_size of 2"),
        ("dm", torch.rand(2, 3, 8, 8), None, "'dm' needs the models of a training run"),
        (LatentNorm(), torch.rand(2, 3, 8, 8), None, "'latentnorm' reads latents, so it cannot score images alone"),
    ],
)
def test_unusable_images_are_refused(rewards: str, images: Tensor, prompts: Any, words: str) -> None:
    """Wrong ranges, layouts and dtypes say what was got and what to do."""
    with pytest.raises(RewardError, match=words):
        score_images(rewards, images, prompts)
