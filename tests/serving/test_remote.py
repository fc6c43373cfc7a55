"""A reward that a server scores: the same as the local one, and never a made-up score when the server fails."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live_servers import Faulty, Reader, Spread, serving

from rdm_sdk import RDMTrainer, RewardBatch, RewardError, score_images
from rdm_sdk.digits.reward import Legibility
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.rewards.resolve import plan_rewards, resolve_rewards
from rdm_sdk.serving import client as client_module
from rdm_sdk.serving.client import ServerLostError
from rdm_sdk.serving.remote import Remote
from rdm_sdk.testing import example_batch, parametrize_reward_checks

QUICK: dict[str, Any] = {"timeout": 0.5, "retries": 2, "max_wait": 1.5}


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    """A server of legibility, a group reward and one that reads prompts and a column; it fails when told to."""
    with serving([Legibility(), Spread(), Reader()], token="hush") as app:
        yield app


@pytest.fixture(autouse=True)
def _sound(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with a server that works, and with its token."""
    monkeypatch.setenv("JUDGE_TOKEN", "hush")
    monkeypatch.setattr(client_module, "BACKOFF", 0.02)
    server.fault = ""
    yield
    server.fault = ""


def remote(server: Faulty, reward: str | None = "legibility", **options: Any) -> Remote:
    return Remote(**(QUICK | {"url": server.url, "reward": reward, "token_env": "JUDGE_TOKEN"} | options))


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
        ({"url": ()}, "at least one address"),
        ({"url": "http://user:hush@judge"}, "may hold no password"),
        ({"timeout": 0}, "timeout"),
        ({"transport": "float64"}, "transport"),
    ],
)
def test_what_is_wrong_is_found_when_it_is_made(
    server: Faulty, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RewardError, within the set time, before anything is trained."""
    monkeypatch.setenv("WRONG_TOKEN", "hushh")
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        remote(server, **options)
    assert words in str(caught.value)
    assert "hush" not in str(caught.value) or "may hold no password" in words
    assert time.monotonic() - started < 3


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


# ---- Servers that fail ----------------------------------------------------------------------------------------------

LOST = [
    ("hang", r"did not answer within timeout=0\.5 s"),
    ("cut", "RemoteProtocolError"),
    ("503", "answered 503"),
    ("500", "answered 500: .*a proxy's page"),
]


@pytest.mark.parametrize("wanted", ["gradient", "scores"])
@pytest.mark.parametrize(("fault", "words"), LOST)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_lost_server_stops_or_skips(server: Faulty, fault: str, words: str, on_error: Any, wanted: str) -> None:
    """As `reward_on_error` says, within `max_wait`, and there is no score of 0."""
    reward = remote(server, **({"retries": 1} if fault == "hang" else {}))
    server.fault = fault
    started = time.monotonic()
    options: dict[str, Any] = {"gradients_of": None if wanted == "gradient" else ()}
    rewards = {"judge": reward, "local": Legibility()}
    if on_error == "raise":
        with pytest.raises(ServerLostError, match=words):
            evaluate_rewards(rewards, Legibility().example(), **options)
    else:
        result = evaluate_rewards(rewards, Legibility().example(), on_error="skip", **options)
        assert list(result.outputs) == ["local"]
        assert isinstance(result.skipped["judge"], ServerLostError)
    assert time.monotonic() - started < QUICK["max_wait"] + 0.5


NONSENSE = [
    ("garbage", "answered nonsense for 'legibility'"),
    ("endless", "answered more than"),
    ("short", r"must be floats of shape \[8\]; got \[7\]"),
    ("infinite", "holds an infinite number"),
    ("other label", "must be floats of shape"),
    ("404", "answered 404"),
    ("401", "answered 401"),
    ("302", "answered 302"),
]


@pytest.mark.parametrize("wanted", ["gradient", "scores"])
@pytest.mark.parametrize(("fault", "words"), [*NONSENSE, ("NaN gradient", "is not finite")])
def test_nonsense_is_never_skipped_over(server: Faulty, fault: str, words: str, wanted: str) -> None:
    """It stops the run under every policy."""
    if fault == "NaN gradient" and wanted == "scores":
        pytest.skip("there is no gradient among scores")
    reward = remote(server)
    server.fault = fault
    with pytest.raises(RewardError, match=words):
        evaluate_reward(
            reward, Legibility().example(), on_error="skip", gradients_of=None if wanted == "gradient" else ()
        )


def test_what_the_servers_reward_does_wrong(server: Faulty) -> None:
    """An exception over there can be skipped; nonsense over there cannot."""
    reward = remote(server, "reader")
    images = torch.rand(2, 3, 8, 8)

    def batch(text: str) -> RewardBatch:
        return RewardBatch.from_images(images, ["1", text], columns={"extra": [0, 0]})

    with pytest.raises(ServerLostError, match="the reward 'reader' raised OSError: no route to the judge"):
        evaluate_reward(reward, batch("raise"))
    skipped = evaluate_rewards({"r": reward, "s": Spread()}, batch("raise"), on_error="skip").skipped
    assert list(skipped) == ["r"]
    with pytest.raises(RewardError, match="infinite score"):
        evaluate_reward(reward, batch("infinite"), on_error="skip")


def test_a_server_that_is_busy_is_asked_again(server: Faulty) -> None:
    """Forty answers of a hundred are 503: every call succeeds in the end, with the right scores."""
    reward, expected = remote(server), evaluate_reward(Legibility(), Legibility().example()).scores
    server.fault = "40%"
    server.seen.clear()
    for _ in range(10):
        torch.testing.assert_close(evaluate_reward(reward, Legibility().example(), gradients_of=()).scores, expected)
    assert server.seen["/v1/score"] >= 16


def test_another_server_takes_over(server: Faulty) -> None:
    """Equal servers are asked in turn; the one that answered is asked first the next time."""
    batch, expected = Legibility().example(), evaluate_reward(Legibility(), Legibility().example()).scores
    with serving([Legibility()], token="hush") as second:
        reward = remote(server, url=(second.url, server.url), max_wait=5)
        evaluate_reward(reward, batch)
        before = server.seen["/v1/score"]
        second.server.stop(at_once=True)
        for _ in range(2):
            torch.testing.assert_close(evaluate_reward(reward, batch, gradients_of=()).scores, expected)
        assert server.seen["/v1/score"] == before + 2


def test_a_server_that_is_killed_in_the_middle() -> None:
    """A call that is under way fails within the set time."""
    with serving([Reader(seconds=0.4)]) as app:
        reward = Remote(url=app.url, **QUICK)
        batch = RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, 0]})
        threading.Timer(0.1, app.server.stop, kwargs={"at_once": True}).start()
        started = time.monotonic()
        with pytest.raises(ServerLostError, match=r"no answer from|answered 500"):
            evaluate_reward(reward, batch)
        assert time.monotonic() - started < QUICK["max_wait"] + 1


def test_a_time_limit_of_the_run_comes_first(server: Faulty) -> None:
    """`reward_timeout` bounds a remote reward as it does every asynchronous one."""
    reward = remote(server, timeout=20, max_wait=60)
    server.fault = "hang"
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than its time limit of 0\.2 s"):
        evaluate_reward(reward, Legibility().example(), time_limit=0.2)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, object()]}), "JSON"),
        (
            lambda: RewardBatch.from_images(torch.rand(2, 3, 8, 8), ["1", "2"], columns={"extra": [0, torch.nan]}),
            "cannot be sent",
        ),
        (lambda: RewardBatch.from_images(torch.rand(1, 3, 5000, 1), ["1"], columns={"extra": [0]}), "4096"),
        (lambda: RewardBatch.from_images(torch.rand(600, 3, 1, 1), ["1"] * 600, columns={"extra": [0] * 600}), "512"),
    ],
)
def test_what_cannot_be_sent(server: Faulty, batch: Callable[[], RewardBatch], words: str) -> None:
    """It is said before it is sent, and never skipped over."""
    server.seen.clear()
    with pytest.raises(RewardError):
        evaluate_reward(remote(server, "reader"), batch(), on_error="skip")
    assert not server.seen["/v1/score"]
    assert words


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_run_without_its_server_stops_or_goes_on(
    server: Faulty, make_trainer: Callable[..., RDMTrainer], tmp_path: Path, policy: str
) -> None:
    """After the first step the server is gone: the run stops, or goes on without that reward and counts it."""
    spec = f'remote[url="{server.url}",reward=reader,token_env=JUDGE_TOKEN,retries=0,timeout=0.5]'
    trainer = make_trainer(
        tmp_path,
        f"dm + 0.1*{spec}",
        prompts=_numbered(),
        max_steps=3,
        reward_on_error=policy,
        lr_scheduler_type="constant",
    )
    asked = trainer.step.begin

    def begin(window: Any, step: int) -> None:
        server.fault = "503" if step else ""
        asked(window, step)

    trainer.step.begin = begin  # type: ignore[method-assign]
    if policy == "raise":
        with pytest.raises(ServerLostError, match="answered 503"):
            trainer.train()
        assert trainer.state.global_step == 1
        return
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert "rewards/remote/mean" in rows[0]
    assert all("rewards/remote/mean" not in row and row["rewards/remote/skipped"] for row in rows[1:])


def _numbered() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [str(number) for number in range(10)], "extra": [1] * 10})


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
        _READER.append(remote(server, "reader", timeout=20, max_wait=60))
    return _READER[0]


def test_a_notebook_can_make_one(server: Faulty) -> None:
    """Where a loop is running already."""

    async def notebook() -> Remote:
        return remote(server)

    assert asyncio.run(notebook()).capabilities.prompts
