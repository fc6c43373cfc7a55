"""UnifiedReward behind OpenAI's API: what it is asked, and what its answers count for."""

import math

import pytest
import torch
from chat_servers import brightness, chatting, completion, question
from rdm_reward_unified.api import UnifiedApi
from rdm_reward_unified.text import AXES, FINAL

from rdm_sdk import RewardError, score_images
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing import check_reward, reward_checks


def rated(body):
    """An answer whose rating follows the picture's brightness and the prompt's length."""
    prompt = question(body).rsplit("[", 1)[1]
    return completion(f"fox (object): 1\nFinal Score: {1 + 3 * brightness(body) + len(prompt) % 7 / 10:.4f}")


@pytest.fixture
def server():
    with chatting(rated) as app:
        yield app


def images(*levels):
    return (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


def test_scores(server):
    """Each picture is asked about with its prompt, in the form of the variant, and gets the rating of its answer."""
    spec = f'unified-api[url="{server.url}",model=judge-7b,max_new_tokens=300]'
    prompts = ["a fox", "two [red] boats", "fox"]
    scores = score_images(spec, images(0, 51, 255), prompts).outputs["unified-api"].scores
    expected = [
        1 + 3 * level + len(prompt.rsplit("[", 1)[-1] + "]") % 7 / 10
        for level, prompt in zip((0, 0.2, 1), prompts, strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert sorted(map(question, server.asked[1:])) == sorted(map(FINAL.ask, prompts))
    assert {body["max_completion_tokens"] for body in server.asked} == {300}
    assert not any("logprobs" in body for body in server.asked)


def test_axes(server):
    """The other variant asks the other question and takes the mean of its three ratings."""
    lines = "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"
    server.answer = lambda body: completion(lines)
    (resolved,) = resolve_rewards(f'unified-api:axes[url="{server.url}",model=judge-7b]')
    assert score_images(resolved.reward, images(0), ["fox"]).outputs["unified-api"].scores.tolist() == [
        pytest.approx(10 / 3)
    ]
    assert question(server.asked[-1]) == AXES.ask("fox")


def test_answers_without_a_rating(server):
    """They are NaN, and a model that gives none about a gray square is an error when the reward is made."""
    reward = UnifiedApi(url=server.url, model="judge-7b")
    server.answer = lambda body: completion("I cannot.", finish="stop") if brightness(body) > 0.5 else rated(body)
    assert score_images(reward, images(255, 0), ["fox"] * 2).outputs["unified-api"].scores.isnan().tolist() == [
        True,
        False,
    ]
    server.answer = lambda body: completion("A gray square.")
    with pytest.raises(RewardError, match=r"does not rate as UnifiedReward does.*'A gray square\.'.*'Final Score'"):
        UnifiedApi(url=server.url, model="judge-7b")
    server.answer = lambda body: completion("", finish="content_filter")
    assert math.isnan(UnifiedApi(url=server.url, model="judge-7b")._score(reward.endpoint.try_out("fox")))


def test_contract(server, monkeypatch):
    """The reward keeps the SDK's contract; its imports are those of `unified` and `vlm-api`, which were looked at."""
    monkeypatch.setattr(reward_checks, "import_problem", lambda module: "")
    check_reward(UnifiedApi(url=server.url, model="judge-7b"))
