"""Evaluating sets of rewards: decoded once, chunked, on errors, together where asynchronous."""

from __future__ import annotations

import asyncio
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_sdk import (
    Capabilities,
    ConfigError,
    Reward,
    RewardBatch,
    RewardConfig,
    RewardError,
    RewardOutput,
    score_images,
)
from rdm_sdk.rewards.callables import as_reward
from rdm_sdk.rewards.evaluate import Evaluation, evaluate_reward, evaluate_rewards
from rdm_sdk.testing import example_images


class Brightness(Reward):
    """Mean brightness, differentiable."""

    capabilities = Capabilities(gradient="autograd")

    class Config(RewardConfig):
        power: float = 1.0

    def score(self, batch: RewardBatch) -> Tensor:
        return (batch.images**self.config.power).mean(dim=(1, 2, 3))


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


def count_ink(images, prompts, **columns):
    """Scored, not differentiated."""
    return (1 - images.mean(dim=(1, 2, 3))).tolist()


def latent_batch(decoded: list[int] | None = None, count: int = 6) -> RewardBatch:
    """Six samples in groups of two; `decoded` collects the sizes of the batches that are decoded."""
    latents = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def decode(z: Tensor) -> Tensor:
        if decoded is not None:
            decoded.append(len(z))
        return z.sigmoid().repeat_interleave(2, dim=-1)

    return RewardBatch(
        latents=latents,
        prompts=[f"p{i // 2}" for i in range(count)],
        group_size=2,
        decode=decode,
        columns={"row": list(range(count))},
    )


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


# ---- Errors -----------------------------------------------------------------------------------------------------


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
            r"one magnitude per sample, shape \[6\], or None; got \[1\]",
        ),
    ],
)
def test_unusable_gradients_raise(returned: object, words: str) -> None:
    """A gradient has the latents' shape and is finite."""
    with pytest.raises(RewardError, match=words):
        evaluate_reward(OwnField(returned), latent_batch())


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


# ---- Asynchronous rewards, times, provenance ----------------------------------------------------------------------


def sleeping(seconds: float, value: float = 1.0) -> Any:
    """An asynchronous reward that waits."""

    async def wait(images, prompts, **columns):
        await asyncio.sleep(seconds)
        return [value] * len(prompts)

    return wait


def test_asynchronous_rewards_run_together() -> None:
    """Two that wait, and a synchronous one that computes, take as long as the longest."""

    def busy(images, prompts, **columns):
        time.sleep(0.3)
        return [0.0] * len(prompts)

    rewards = {"a": as_reward(sleeping(0.3, 1.0), "a"), "b": as_reward(sleeping(0.3, 2.0), "b"), "c": as_reward(busy)}
    started = time.perf_counter()
    result = evaluate_rewards(rewards, latent_batch())
    assert time.perf_counter() - started < 0.8
    assert [result.outputs[name].scores[0].item() for name in "abc"] == [1.0, 2.0, 0.0]
    assert all(result.seconds[name] >= 0.28 for name in "abc")


def test_asynchronous_rewards_inside_a_running_loop() -> None:
    """In a notebook a loop is already running."""

    async def notebook() -> Evaluation:
        return evaluate_rewards({"a": as_reward(sleeping(0.01, 3.0), "a")}, latent_batch())

    assert asyncio.run(notebook()).outputs["a"].scores.tolist() == [3.0] * 6


def test_asynchronous_rewards_keep_their_loop() -> None:
    """What they keep between calls, such as a lock that was waited for, stays usable."""
    limit = asyncio.Semaphore(1)

    async def limited(images, prompts, **columns):
        async with limit:
            await asyncio.sleep(0.01)
            return [1.0] * len(prompts)

    rewards = {name: as_reward(limited, name) for name in "ab"}
    for _ in range(2):
        assert evaluate_rewards(rewards, latent_batch(), chunk_size=2).outputs["b"].scores.tolist() == [1.0] * 6


def test_asynchronous_rewards_have_images_of_their_own() -> None:
    """What they change in place is nobody else's."""

    async def evil(images, prompts, **columns):
        images.zero_()
        return [0.0] * len(prompts)

    rewards = {"evil": as_reward(evil, "evil"), "ink": as_reward(count_ink)}
    found = evaluate_rewards(rewards, latent_batch()).outputs["ink"].scores
    assert torch.equal(found, evaluate_reward(as_reward(count_ink), latent_batch()).scores)


def test_an_object_with_an_asynchronous_call() -> None:
    """Such an object is awaited as well."""

    class Client:
        async def __call__(self, images, prompts, **columns):
            return [4.0] * len(prompts)

    assert evaluate_reward(as_reward(Client(), "client"), latent_batch()).scores.tolist() == [4.0] * 6


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_asynchronous_error(on_error: Any) -> None:
    """Errors of asynchronous rewards follow the same policy."""

    async def broken(images, prompts, **columns):
        raise TimeoutError("too slow")

    rewards = {"slow": as_reward(broken, "slow"), "bright": Brightness()}
    if on_error == "raise":
        with pytest.raises(TimeoutError, match="too slow"):
            evaluate_rewards(rewards, latent_batch())
    else:
        result = evaluate_rewards(rewards, latent_batch(), on_error="skip")
        assert list(result.outputs) == ["bright"]
        assert isinstance(result.skipped["slow"], TimeoutError)


def test_times_and_provenance() -> None:
    """Each reward has its time, and what its scores must be stored with."""
    result = evaluate_rewards({"bright": Brightness(power=3.0)}, latent_batch())
    assert result.seconds["bright"] > 0
    stored = result.provenance["bright"]
    assert stored["reward"] == "brightness"
    assert stored["options"] == {"power": 3.0}
    assert stored["origin"] == __name__
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
        ("jpeg", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, "got .*uint8"),
        ("jpeg", torch.rand(2, 3, 8, 8), ["a"], "2 images do not go with 1 prompts"),
        ("jpeg", [[0.5]], None, "got list"),
        ("jpeg", torch.rand(0, 3, 8, 8), None, "at least one image"),
        ("legibility", torch.rand(2, 3, 8, 8), None, "'legibility' reads prompts; pass one per image"),
        (
            lambda images, caption: [0.0],
            torch.rand(2, 3, 8, 8),
            None,
            r"needs a column 'caption'; pass columns={'caption'",
        ),
        ("dm", torch.rand(2, 3, 8, 8), None, "'dm' needs the models of a training run"),
    ],
)
def test_unusable_images_are_refused(rewards: str, images: Tensor, prompts: Any, words: str) -> None:
    """Wrong ranges, layouts and dtypes say what was got and what to do."""
    with pytest.raises(RewardError, match=words):
        score_images(rewards, images, prompts)
