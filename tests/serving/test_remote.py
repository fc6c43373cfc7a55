"""A reward that a server scores: the same as the local one, and never a made-up score when the server fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live_servers import QUICK, Faulty, Spread, remote, serving
from PIL import Image

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, RewardConfig, RewardError, score_images
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import plan_rewards, resolve_rewards
from rdm_sdk.serving.remote import Remote
from rdm_sdk.serving.requests import Request
from rdm_sdk.serving.scorer import Scorer
from rdm_sdk.testing import example_batch, parametrize_reward_checks

pytestmark = pytest.mark.usefixtures("sound")

# ---- It is the local reward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "near_scores", "near_gradient"), [("float32", 0, 0), ("float16", 2e-3, 0.02), ("uint8", 0.02, 0.1)]
)
def test_it_equals_the_local_reward(server: Faulty, transport: str, near_scores: float, near_gradient: float) -> None:
    """Exactly in float32; to the rounding of the images otherwise. The gradient is carried back by the host."""
    batch = Legibility().example()
    local, distant = evaluate_reward(Legibility(), batch), evaluate_reward(remote(server, transport=transport), batch)
    assert (local.scores - distant.scores).abs().max() <= near_scores
    assert local.gradient is not None
    assert distant.gradient is not None
    assert (local.gradient - distant.gradient).norm() <= near_gradient * local.gradient.norm()


def test_a_gradient_may_be_longer_than_a_header(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is bounded by what was asked: a number for each of the images."""
    monkeypatch.setattr("rdm_sdk.serving.client.HEADER_LIMIT", 2**12)
    batch = Legibility().example()
    assert batch.images.numel() > 2**12
    assert evaluate_reward(remote(server), batch).gradient is not None


class Logging(Reward):
    """Logs the step that it is told, and the light of every image; differentiable."""

    name = "logging"
    capabilities = Capabilities(gradient="autograd")

    def score(self, batch: RewardBatch) -> torch.Tensor:
        batch.log("step", -1 if batch.step is None else batch.step)
        batch.log("light", batch.images.mean(dim=(1, 2, 3)))
        return batch.images.mean(dim=(1, 2, 3))


def test_the_step_goes_there_and_what_is_logged_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a gradient; an older server, which lists no fields, is not sent the step."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with serving([Logging()]) as app:
        made = Remote(url=app.url)
        for graded in (None, ()):
            for step in (None, 3):
                batch = RewardBatch.from_images(images, step=step)
                local, distant = (evaluate_reward(one, batch, gradients_of=graded) for one in (Logging(), made))
                assert distant.logged["step"].tolist() == [-1 if step is None else step] * 4
                torch.testing.assert_close(distant.logged, local.logged, rtol=0, atol=0)
        monkeypatch.setattr("rdm_sdk.serving.app.FIELDS", ())
        older = Remote(url=app.url)
        assert evaluate_reward(older, batch).logged["step"].tolist() == [-1] * 4
        picture = io.BytesIO()
        Image.new("RGB", (4, 4), (255, 0, 0)).save(picture, "PNG")
        body = {"images": [base64.b64encode(picture.getvalue()).decode()], "step": 5}
        told = httpx2.post(f"{app.url}/v1/score", json=body).json()
        assert told["logged"]["logging"]["step"] == [5]


def test_requests_of_other_steps_are_judged_apart() -> None:
    """Two that wait are put together only where the step is the same."""
    scorer = Scorer(resolve_rewards([Logging()]), "cpu")
    try:
        requests = [Request(torch.rand(2, 3, 8, 8), step=step) for step in (0, 0, 1, None)]
        with scorer._changed:  # so that nothing is taken before all of it waits
            futures = [scorer.submit(request, False) for request in requests]
        steps = [future.result()["logging"].logged["step"].tolist() for future in futures]
    finally:
        scorer.close()
    assert steps == [[0, 0], [0, 0], [1, 1], [-1, -1]]


def test_8_bits_are_the_nearest_ones(server: Faulty) -> None:
    """As `uint8`, an image arrives rounded, not cut off."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sent, rounded = (RewardBatch.from_images(x, ["one", "two"]) for x in (images, (images * 255).round() / 255))
    expected = evaluate_reward(Legibility(), rounded, gradients_of=()).scores
    distant = evaluate_reward(remote(server, transport="uint8"), sent, gradients_of=()).scores
    torch.testing.assert_close(distant, expected, rtol=0, atol=1e-6)


def test_it_does_not_apply_where_the_local_one_does_not(server: Faulty) -> None:
    """NaN travels, in the scores alone; a batch to which nothing applies is no lost server."""
    batch = Legibility().example()
    batch.prompts[2] = "a fox"
    local, distant = evaluate_reward(Legibility(), batch), evaluate_reward(remote(server), batch)
    torch.testing.assert_close(distant.scores, local.scores, equal_nan=True)
    torch.testing.assert_close(distant.gradient, local.gradient)
    batch.prompts[:] = ["a fox"] * 8
    with pytest.raises(RewardError, match=r"NaN .not applicable. for every sample"):
        evaluate_reward(remote(server), batch)


def test_it_can_do_what_the_servers_reward_can(server: Faulty) -> None:
    """Its capabilities are those over there; nothing of it takes memory here."""
    capabilities = remote(server).capabilities
    assert (capabilities.gradient, capabilities.prompts, capabilities.range) == ("awaited", True, (0.0, 1.0))
    assert (capabilities.asynchronous, capabilities.parameters) == (True, 0)
    assert remote(server, "spread").capabilities.scope == "group"
    reader = remote(server, "reader").capabilities
    assert (reader.gradient, reader.columns) == ("none", ("extra",))
    (planned,) = plan_rewards(f'remote[url="{server.url}",reward=reader,token_env=JUDGE_TOKEN]')
    assert planned.route == "advantage"
    (planned,) = plan_rewards(f'remote[url="{server.url}",reward=legibility,token_env=JUDGE_TOKEN]')
    assert planned.route == "gradient"


@parametrize_reward_checks(lambda: _kept("legibility"), batch=lambda: Legibility().example())
def test_contract_of_a_gradient(check: Callable[[], None]) -> None:
    """The whole kit, gradient checks included."""
    check()


@parametrize_reward_checks(lambda: _kept("spread"), batch=lambda: example_batch(Spread(), 16, 16))
def test_contract_of_a_group_reward(check: Callable[[], None]) -> None:
    """Groups arrive whole."""
    check()


_KEPT: list[Any] = []


def _kept(label: str) -> Remote:
    """A reward for the kit, whose server lives as long as the module's tests."""
    context = serving([Legibility(), Spread()])
    app = context.__enter__()
    _KEPT.append(context)
    return Remote(url=app.url, reward=label)


@pytest.fixture(scope="module", autouse=True)
def _kit_servers() -> Iterator[None]:
    yield
    while _KEPT:
        _KEPT.pop().__exit__(None, None, None)


def test_a_run_is_the_local_run(
    server: Faulty, make_trainer: Callable[..., RDMTrainer], tmp_path: Path, losses_of: Callable[..., Any]
) -> None:
    """Two steps of `dm + 0.1*remote[...]` log what those of `dm + 0.1*legibility` do, and the weights are the same."""
    spec = f'remote[url="{server.url}",reward=legibility,token_env=JUDGE_TOKEN'
    runs = {"local": "legibility", "distant": f"{spec}]", "half": f"{spec},transport=float16]"}
    rows, weights = {}, {}
    for name, reward in runs.items():
        trainer = make_trainer(tmp_path / name, f"dm + 0.1*{reward}")
        trainer.train()
        label = "legibility" if name == "local" else "remote"
        rows[name] = [[row["loss"], row[f"rewards/{label}/mean"], row[f"{label}/pull"]] for row in losses_of(trainer)]
        weights[name] = torch.cat([p.detach().flatten() for p in trainer.parameters_of("student")])
    assert rows["distant"] == rows["local"]
    assert torch.equal(weights["distant"], weights["local"])
    for ours, theirs in zip(rows["half"], rows["local"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_what_it_is_is_kept_with_the_scores_and_the_token_is_not(server: Faulty) -> None:
    """Provenance holds the server's; the token is in no spec, message, provenance or repr."""
    reward = remote(server)
    told = reward.provenance()
    assert told["served"]["reward"] == "legibility"  # type: ignore[index]
    assert reward.preprocessing == told["preprocessing"] == "gray, area-resized to 16x16"
    term = str(resolve_rewards(reward)[0].term)
    assert "JUDGE_TOKEN" in term
    assert "hush" not in json.dumps(told) + term + repr(reward.config)


def test_a_reward_with_a_limit_that_is_none_can_be_served() -> None:
    """JSON has no infinity, and an option may well be infinite."""

    class Capped(Reward):
        name = "capped"
        capabilities = Capabilities()

        class Config(RewardConfig):
            most: float = float("inf")

        config: Config

        def score(self, batch: RewardBatch) -> torch.Tensor:
            return batch.images.mean(dim=(1, 2, 3)).clamp(max=self.config.most)

    with serving([Capped()]) as app:
        told: Any = Remote(url=app.url, **QUICK).provenance()["served"]
    assert told["options"] == {"most": "Infinity"}


def test_images_can_be_scored_without_a_run(server: Faulty) -> None:
    """`score_images` takes it as any other."""
    batch = Legibility().example()
    spec = f'remote[url="{server.url}",reward=legibility,token_env=JUDGE_TOKEN]'
    scores = score_images(spec, batch.latents, batch.prompts, batch_size=3).outputs["remote"].scores
    torch.testing.assert_close(scores, evaluate_reward(Legibility(), batch).scores)


# ---- Before training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "legibilty"}, "serves no reward 'legibilty'. Did you mean 'legibility'?"),
        ({"reward": None}, "serves legibility, spread, reader; say which one"),
        ({"token_env": None}, "answered 401: the token is missing or wrong"),
        ({"token_env": "WRONG_TOKEN"}, "answered 401: the token is missing or wrong"),
        ({"token_env": "NO_TOKEN"}, "token_env='NO_TOKEN': the environment variable is not set"),
        ({"url": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9"),
        ({"url": ("http://127.0.0.1:9", "http://127.0.0.1:19")}, "no answer from http://127.0.0.1:"),
        ({"url": "judge:8000"}, "'judge:8000' is no address"),
        ({"url": "ftp://judge"}, "is no address"),
        ({"url": "http://judge:8x"}, "'http://judge:8x' is no address such as 'http://judge:8000': Port"),
        ({"url": "http://judge:99999"}, "is no address such as 'http://judge:8000': Port out of range"),
        ({"url": "http://[judge"}, "is no address such as"),
        ({"url": ()}, "at least one address"),
        ({"url": "http://user:hush@judge"}, "may hold no password"),
        ({"url": None}, "reward 'remote': where is its server? Give url="),
        ({"url": None, "url_env": "NO_URL"}, "Set the environment variable NO_URL to its address"),
        ({"url": None, "url_env": "WRONG_URL"}, "the environment variable WRONG_URL: 'judge:8000' is no address"),
        ({"timeout": 0}, "timeout"),
        ({"transport": "float64"}, "transport"),
    ],
)
def test_what_is_wrong_is_found_when_it_is_made(
    server: Faulty, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RewardError, within the set time, before anything is trained."""
    monkeypatch.setenv("WRONG_TOKEN", "hushh")
    monkeypatch.setenv("WRONG_URL", "http://judge:8000, judge:8000")
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        remote(server, **(QUICK | options))
    assert words in str(caught.value)
    assert "hush" not in str(caught.value) or "may hold no password" in words
    assert time.monotonic() - started < 3


def test_its_address_may_stand_in_the_environment(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several are parted by commas; an option wins, and no file holds the address."""
    monkeypatch.setenv("JUDGE_URL", f"{server.url}, http://127.0.0.1:9")
    made = remote(server, url=None, url_env="JUDGE_URL")
    assert made.client.urls == [server.url, "http://127.0.0.1:9"]
    assert server.url not in json.dumps(made.provenance())
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9")
    assert remote(server, url_env="JUDGE_URL").client.urls == [server.url]


@pytest.mark.parametrize("answer", [b"{}", b"<html>", b"[1]", b'{"version": 1, "rewards": {}, "limits": {}}'])
def test_something_else_at_the_address(answer: bytes) -> None:
    """A web page is no server of rewards."""
    from live_servers import LiveServer, respond

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 200, answer)

    live = LiveServer(page)
    with pytest.raises(RewardError, match=r"is no server of rewards: .*Start one with 'rdm-sdk serve'"):
        Remote(url=live.url)
    live.stop()


# ---- Many at once ---------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([4, 8])), min_size=16, max_size=16), st.randoms())
def test_sixteen_clients_at_once(server: Faulty, shapes: list[tuple[int, int]], draw: Any) -> None:
    """Each answer belongs to its request, whatever was judged together."""
    reward = _reader(server)
    wanted, batches = [], []
    for number, (count, side) in enumerate(shapes):
        prompts = [str(1000 * number + row) for row in range(count)]
        extra: list[object] = [draw.randint(0, 9) for _ in range(count)]
        images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(number))
        batches.append(RewardBatch.from_images(images, prompts, columns={"extra": extra}))
        numbers = torch.tensor([float(p) + float(str(e)) for p, e in zip(prompts, extra, strict=True)])
        wanted.append(numbers + images.mean(dim=(1, 2, 3)))
    barrier = threading.Barrier(16)

    def ask(batch: RewardBatch) -> torch.Tensor:
        barrier.wait(10)
        return evaluate_reward(reward, batch).scores

    with ThreadPoolExecutor(16) as pool:
        for scores, right in zip(pool.map(ask, batches), wanted, strict=True):
            torch.testing.assert_close(scores, right)


_READER: list[Remote] = []


def _reader(server: Faulty) -> Remote:
    if not _READER:
        _READER.append(remote(server, "reader", max_wait=60))
    return _READER[0]


def test_a_notebook_can_make_one(server: Faulty) -> None:
    """Where a loop is running already."""

    async def notebook() -> Remote:
        return remote(server)

    assert asyncio.run(notebook()).capabilities.prompts


_RANKS = """
import sys
import torch
from rdm_sdk import RDMConfig, RDMTrainer, digits
trainer = RDMTrainer(
    digits.teacher_path(),
    f"dm + 0.1*{sys.argv[2]}",
    args=RDMConfig(output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=4, num_generations=4,
                   guidance_scale=1.0, max_sequence_length=4, critic_steps=1, save_strategy="no", logging_steps=1,
                   disable_tqdm=True, use_cpu=True),
    train_dataset=digits.prompts(),
)
trainer.train()
weights = torch.cat([p.detach().flatten() for p in trainer.parameters_of("student")])
torch.save(weights, f"{sys.argv[1]}/{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_ask_one_server(server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks hold the student that the local reward makes, bit for bit where no two requests are put together."""
    monkeypatch.setattr(server.scorer, "batch_size", 4)  # a rank's: what is judged together may differ in last bits
    (tmp_path / "run.py").write_text(_RANKS)
    found = []
    for reward in ("legibility", f'remote[url="{server.url}",reward=legibility,token_env=JUDGE_TOKEN]'):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        folder = tmp_path / f"out{len(found)}"
        command = [*launch, str(tmp_path / "run.py"), str(folder), reward]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        one, other = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
        assert torch.equal(one, other)
        found.append(one)
    assert torch.equal(found[1], found[0])
