"""The yes/no judge behind OpenAI's API: what it is sent, what its answers count for, and how it fails."""

import json
import math
import time

import pytest
import torch
from chat_servers import brightness, chatting, completion, question
from rdm_reward_vlm.answers import NO, YES, written_number, written_yes
from rdm_reward_vlm.api import VlmApi

from rdm_sdk import RDMConfig, RDMTrainer, RewardBatch, RewardError, digits, score_images
from rdm_sdk.rewards.evaluate import evaluate_reward, evaluate_rewards
from rdm_sdk.serving import asking
from rdm_sdk.serving.asking import ServerLostError
from rdm_sdk.testing import check_reward

BUSY = (429, {}, b'{"error": {"message": "Rate limit reached", "type": "requests"}}')
BROKEN = (500, {}, b"<html>a proxy's page</html>")


def likelihood(body):
    """What the judge believes: more in brighter pictures and longer questions; never 0 or 1."""
    return 0.1 + 0.7 * brightness(body) + 0.1 * (len(question(body)) % 7) / 7


def answered(body):
    yes = likelihood(body)
    return completion("Yes", {"Yes": 0.6 * yes, "No": 0.9 * (1 - yes), " yes": 0.3 * yes, "Maybe": 0.1})


@pytest.fixture(scope="module")
def running():
    with chatting(answered) as app:
        yield app


@pytest.fixture
def server(running, monkeypatch):
    """The server, sound at the start of a test; further tries come soon."""
    monkeypatch.setattr(asking, "BACKOFF", 0.02)
    running.answer, running.seconds, running.faults, running.most = answered, lambda number: 0.0, [], 0
    running.models = ["judge-7b", "other"]
    yield running
    assert running.faults == []


def make(server, **options):
    return VlmApi(**({"url": server.url, "model": "judge-7b", "timeout": 20.0} | options))


def flat(*levels):
    """Gray pictures, `[N, 3, 8, 8]`, of 8-bit levels."""
    return (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


def scores(reward, images, prompts=None, **options):
    batch = RewardBatch.from_images(images, prompts or ["fox"] * len(images))
    return evaluate_reward(reward, batch, gradients_of=(), **options).scores


def test_what_is_sent(server, monkeypatch):
    """A request is what OpenAI's reference says: the picture, then the question, to be answered without chance."""
    monkeypatch.setenv("JUDGE_KEY", "sk-hush")
    reward = make(server, key_env="JUDGE_KEY", question='Is "{prompt}" there? {a}')
    image = torch.randint(256, (1, 3, 5, 9), generator=torch.Generator().manual_seed(0)) / 255
    scores(reward, image, ["a {prompt} fox"])
    body = json.loads(json.dumps(server.asked[-1]))
    link = body["messages"][0]["content"][0]["image_url"].pop("url")
    text = 'Is "a {prompt} fox" there? {a}'
    assert body == {
        "model": "judge-7b",
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": text}]}
        ],
        "max_completion_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert link.startswith("data:image/png;base64,")
    assert brightness(server.asked[-1]) == pytest.approx(float(image.mean()), abs=1e-6)  # the very pixels
    assert server.headers[-1]["authorization"] == "Bearer sk-hush"
    assert server.headers[-1]["content-type"] == "application/json"
    assert "sk-hush" not in repr((reward.provenance(), reward.config, reward.capabilities))
    make(server, top_logprobs=5)
    assert server.asked[-1]["top_logprobs"] == 5
    assert "authorization" not in server.headers[-1]


def test_every_picture_gets_its_answer(server):
    """However late and in whatever order answers come; and never more questions at a time than allowed."""
    reward = make(server, concurrency=5)
    generator = torch.Generator().manual_seed(1)
    delays = (torch.rand(100, generator=generator) * 0.05).tolist()
    server.seconds, server.most = lambda number: delays[number % 100], 0
    levels, prompts = list(range(0, 240, 10)), ["a fox", "two boats", "a red bowl"] * 8
    images = flat(*levels)
    result = score_images(reward, images, prompts, batch_size=7).outputs["vlm-api"].scores
    for score, level, prompt in zip(result.tolist(), levels, prompts, strict=True):
        length = len(reward.config.asked(prompt))
        yes = 0.1 + 0.7 * level / 255 + 0.1 * (length % 7) / 7
        assert score == pytest.approx(yes, abs=1e-6)
    assert 1 < server.most <= 5


@pytest.mark.parametrize(
    ("likeliest", "share"),
    [
        ({"Yes": 0.5, "No": 0.25, "The": 0.25}, 2 / 3),
        ({" No": 0.6, "no": 0.1, "NO": 0.05, "YES": 0.1, " yes": 0.1, "Yeah": 0.05}, 0.2 / 0.95),
        ({"Yes": 0.9, "It": 0.1}, 1),
        ({"no": 0.9, "It": 0.1}, 0),
        ({"It": 0.9, "Yes.": 0.1}, math.nan),
    ],
)
def test_shares(server, likeliest, share):
    """Spellings of an answer are added; an answer that is not listed is impossible; without both there is no score."""
    reward = make(server)
    server.answer = lambda body: completion("", likeliest if brightness(body) > 0.5 else {"Yes": 0.5, "No": 0.5})
    assert scores(reward, flat(255, 0)).tolist() == pytest.approx([share, 0.5], nan_ok=True)


def test_written_answers(server):
    """`read=text` and `read=number` read what is written, and ask for no probabilities."""
    server.answer = lambda body: completion("Yes." if brightness(body) > 0.4 else "**No**, it does not.")
    reward = make(server, read="text")
    assert scores(reward, flat(255, 0, 200)).tolist() == [1, 0, 1]
    assert server.asked[-1].keys() == {"model", "messages", "max_completion_tokens", "temperature"}
    server.answer = lambda body: completion(f"{10 * brightness(body):.1f}")
    rated = make(server, read="number", question="Rate {prompt} from 0 to 10.")
    assert rated.capabilities.range is None
    assert scores(rated, flat(255, 51)).tolist() == pytest.approx([10, 2])
    server.answer = lambda body: completion("Yes, because", finish="length" if brightness(body) > 0.5 else "stop")
    assert scores(reward, flat(255, 0)).tolist() == pytest.approx([math.nan, 1], nan_ok=True)


def test_reading():
    """A first word of yes or no, or a single number; nothing else."""
    said = [written_yes(text) for text in ("yes", " No!", "Yesterday", "I say yes", "", "no")]
    assert said == pytest.approx([1, 0, math.nan, math.nan, math.nan, 0], nan_ok=True)
    numbers = [written_number(text) for text in ("7", "Rating: 8.5.", "-2", "8/10", "ten", "", "9" * 400)]
    assert numbers == pytest.approx([7, 8.5, -2, *[math.nan] * 4], nan_ok=True)
    assert set(YES).isdisjoint(NO)


def test_filtered_pictures(server):
    """A picture that the endpoint will not speak about has no score, and spoils no other."""
    reward = make(server)
    server.answer = lambda b: completion("", finish="content_filter") if brightness(b) > 0.9 else answered(b)
    assert scores(reward, flat(255, 100)).isnan().tolist() == [True, False]


# ---- Failures ---------------------------------------------------------------------------------------------------


def test_a_busy_endpoint_is_asked_again(server):
    """429 and 5xx pass; `Retry-After` is kept to."""
    reward, start = make(server), len(server.asked)
    expected = scores(reward, flat(10, 200))
    server.faults = [BUSY, BROKEN, (503, {}, b""), (429, {"retry-after": "1"}, b"")]
    started = time.monotonic()
    assert torch.equal(scores(reward, flat(10, 200)), expected)
    assert time.monotonic() - started >= 1
    assert len(server.asked) - start == 1 + 2 + 6 - 1


def test_a_pause_that_is_too_long(server):
    """Where the endpoint asks to wait longer than may be waited, nobody waits."""
    reward = make(server, max_wait=5)
    server.faults = [(429, {"retry-after": "60"}, b'{"error": {"message": "quota"}}')]
    started = time.monotonic()
    with pytest.raises(ServerLostError, match=r"429: quota; it asks to wait 60 s, which max_wait=5 s does not allow"):
        scores(reward, flat(10))
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("fault", "words"), [(BROKEN, "answered 500: .*a proxy's page"), (5.0, r"did not answer within timeout=0\.2 s")]
)
def test_a_lost_endpoint(server, fault, words):
    """After all tries it is an exception, for one question of many, which stops the run or skips the reward."""
    reward = make(server)
    reward.endpoint.config = reward.config.model_copy(update={"timeout": 0.2, "retries": 1})
    server.faults = [fault] * 2
    with pytest.raises(ServerLostError, match=words):
        scores(reward, flat(10))
    server.faults = [fault] * 2
    batch = RewardBatch.from_images(flat(10), ["fox"])
    skipped = evaluate_rewards({"judge": reward}, batch, on_error="skip").skipped
    assert isinstance(skipped["judge"], ServerLostError)


def test_one_failure_ends_all(server):
    """The other questions of a call are not asked any more."""
    reward = make(server, concurrency=1, retries=0)
    server.faults, before = [BROKEN], len(server.asked)
    with pytest.raises(ServerLostError, match="500"):
        scores(reward, flat(*range(20)))
    time.sleep(0.1)
    assert len(server.asked) - before <= 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 302])
def test_refusals_are_not_repeated(server, status):
    """They stop the run under every policy, with the endpoint's words."""
    reward, before = make(server), len(server.asked)
    server.faults = [(status, {}, b'{"error": {"message": "we do not want that"}}')]
    with pytest.raises(RewardError, match=f"answered {status}: we do not want that"):
        scores(reward, flat(10), on_error="skip")
    assert len(server.asked) == before + 1


def entry(**changes):
    whole = completion("Yes", {"Yes": 0.5})
    whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0] |= changes
    return whole


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "it is no JSON"),
        (b"[1]", "it is no JSON object"),
        (b"[" * 100_000, "it is no JSON"),
        ({}, "it holds no choices"),
        ({"choices": []}, "it holds no choices"),
        ({"choices": [{"message": "Yes"}]}, "its message holds no text"),
        ({"choices": [{"message": {"content": 3}}]}, "its message holds no text"),
        ({"choices": [{"message": {"content": ""}, "logprobs": {"content": [3]}}]}, "its log probabilities are none"),
        (entry(token=None), "no token with its log probability"),
        (entry(logprob=True), "no token with its log probability"),
        (entry(logprob="-1"), "no token with its log probability"),
        (entry(logprob=0.5), "has a log probability of 0.5"),
        (entry(logprob=-math.inf), "has a log probability of -inf"),
        (bytes(2**24 + 1), "answered more than"),
    ],
)
def test_nonsense(server, answer, words):
    """It is never a score, and is never skipped over."""
    reward = make(server)
    server.answer = lambda body: answer
    with pytest.raises(RewardError, match=words):
        scores(reward, flat(10), on_error="skip")


@pytest.mark.parametrize("missing", ["logprobs", "content"])
def test_without_probabilities(server, missing):
    """An endpoint that gives none is an error when the reward is made, and later; nothing is read in their place."""

    def without(body):
        told = answered(body)
        if missing == "logprobs":
            del told["choices"][0]["logprobs"]
        else:
            told["choices"][0]["logprobs"]["content"] = None
        return told

    reward = make(server)
    server.answer = without
    for ask in (lambda: make(server), lambda: scores(reward, flat(10), on_error="skip")):
        with pytest.raises(RewardError, match=r"gives no log probabilities .* of 'judge-7b'.*read=text"):
            ask()


# ---- Before training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "judge-7B"}, r"serves no model 'judge-7B'\. Did you mean 'judge-7b'\? It serves: judge-7b, other"),
        ({"url": "http://127.0.0.1:9/v1", "retries": 0}, r"no answer from http://127.0.0.1:9/v1/models .*ConnectError"),
        ({"url": "judge:8000"}, "is no address"),
        ({"url": "http://me:secret@judge/v1"}, "no password"),
        ({"key_env": "NO_SUCH_KEY"}, "key_env='NO_SUCH_KEY': the environment variable is not set"),
        ({"question": "Is it good?"}, r"must contain \{prompt\}"),
        ({"read": "number"}, "needs a question that asks for a number"),
        ({"read": "text", "top_logprobs": 5}, r"top_logprobs=5 is for read=logprobs"),
        ({"concurrency": 0}, "concurrency"),
        ({"api_key": "sk"}, "api_key"),
    ],
)
def test_mistakes(server, options, words):
    """They are found when the reward is made."""
    with pytest.raises(RewardError, match=words):
        make(server, **options)


def test_an_address_that_ends_too_soon(server):
    """The commonest mistake: the address without /v1."""
    with pytest.raises(RewardError, match=r"/models answered 404: .*Not Found.*Does url= end where"):
        make(server, url=server.url.removesuffix("/v1"))


def test_a_model_that_does_not_answer_at_once(server):
    """One that thinks first, or that does not know the question, is found when the reward is made."""
    server.answer = lambda body: completion("<think>", {"<think>": 0.9, "\n": 0.1})
    with pytest.raises(
        RewardError, match=r"does not answer .* with yes or no: its likeliest first tokens are '<think>'"
    ):
        make(server)
    with pytest.raises(RewardError, match="it wrote '<think>'"):
        make(server, read="text")
    server.answer = lambda body: {"choices": [{"message": {"content": None}, "logprobs": {"content": []}}]}
    with pytest.raises(RewardError, match="first tokens are nothing"):
        make(server)


def test_a_run(server, tmp_path, monkeypatch):
    """A run is trained on it; the key is in nothing that the run writes, the name of its variable is."""
    monkeypatch.setenv("JUDGE_KEY", "sk-hush")
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "guidance_scale": 1.0, "critic_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_steps": 1}
    args = RDMConfig(output_dir=str(tmp_path), max_steps=1, max_sequence_length=4, **settings, **quiet)
    spec = f'dm + 0.5*vlm-api[url="{server.url}",model=judge-7b,key_env=JUDGE_KEY]'
    trainer = RDMTrainer(digits.teacher_path(), spec, args, digits.prompts())
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert 0.1 < row["rewards/vlm-api/mean"] < 0.9
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, text in written.items() if b"sk-hush" in text]
    assert b"JUDGE_KEY" in written[tmp_path / "student" / "README.md"]


def test_contract(server):
    """The reward keeps the SDK's contract."""
    check_reward(make(server))
