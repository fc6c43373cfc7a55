"""UnifiedReward: what is asked, written and read, on a tiny random LLaVA, whose image processor runs on PIL."""

import hashlib
import math

import numpy as np
import pytest
import torch
from rdm_reward_unified import reward as module
from rdm_reward_unified.reward import UnifiedReward, answers
from rdm_reward_unified.text import AXES, FINAL
from transformers import LlavaForConditionalGeneration

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.testing import check_reward, example_images, save_tiny_llava

SIZE = 32
WORDS = ["Final", "Score", ":", "1", "2", "3", "4", "5", "fox", "boat", "red", "a", "two", "at", "night"]
VOCABULARY = ["<pad>", "<unk>", "<image>", "USER", "ASSISTANT", *WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA on disk, which can say yes and no."""
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava"), [*VOCABULARY, "Yes", "No"], image_size=SIZE))


@pytest.fixture(scope="module")
def reward(folder):
    return UnifiedReward(path=folder, dtype="float32", max_new_tokens=5)


def images(count=4):
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 255


def rated(judge, pictures, questions, max_new_tokens):
    """Answers whose rating follows the picture's brightness and the question's words."""
    pairs = zip(pictures, questions, strict=True)
    scores = [1 + 3 * np.asarray(picture).mean() / 255 + len(question) % 7 / 10 for picture, question in pairs]
    return [f"fox (object): 1\nFinal Score: {score:.4f}" for score in scores]


def test_questions():
    """They are the originals' to the letter, prompts with braces included."""
    for form, checksum in (
        (FINAL, "29a5942bb09bad23e252d3d2c0e4ab78593e622ef3fae677658dbd47b140aaba"),
        (AXES, "0f2e89e0e4b34195cd7302274244f75407031d55028c71256df569400d637175"),
    ):
        question = form.ask("a {red} fox")
        assert question.endswith("Your task is provided as follows:\nText Caption: [a {red} fox]")
        assert hashlib.sha256(form.ask("").encode()).hexdigest() == checksum


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("ocean (location): 0\nclouds (object): 1\nFinal Score: 2.33", 2.33),
        ("Final Score: 5", 5),
        ("Final Score :4.0.", 4),
        ("after 'Final Score:'. So, Final Score: 3", 3),
        ("Final Score: 1 ... no, Final Score: 2", 2),
        ("Final Score: 0", math.nan),
        ("Final Score: 50", math.nan),
        ("Final Score: -3", math.nan),
        ("Final Score: five", math.nan),
        ("Score: 3", math.nan),
        ("", math.nan),
    ],
)
def test_final_score(answer, rating):
    """The last number after the title counts, if it is a rating."""
    assert FINAL.read(answer) == pytest.approx(rating, nan_ok=True)


def test_axes():
    """The authors' example of an answer; an answer that lacks an axis has no rating."""
    lines = [
        "Alignment Score (1-5): 2.694700002670288",
        "Coherence Score (1-5): 2.371500015258789",
        "Style Score (1-5): 2.802500009536743",
    ]
    assert AXES.read("\n".join(lines)) == pytest.approx((2.6947 + 2.3715 + 2.8025) / 3)
    for gone in range(3):
        assert math.isnan(AXES.read("\n".join(lines[:gone] + lines[gone + 1 :])))
    assert math.isnan(AXES.read("\n".join([*lines[:2], "Style Score (1-5): 7"])))


def test_what_is_written(reward, folder):
    """Answers are the likeliest tokens, one forward pass after the other, whatever stands beside them in the batch."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    questions = ["a red fox", "two boat night", "fox fox fox"]
    pictures = [module.to_pil(image) for image in images(3)]
    together = answers(reward.judge, pictures, questions, 5)
    for text, picture, question in zip(together, pictures, questions, strict=True):
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        inputs = reward.judge.processor.apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids, asked = inputs["input_ids"], inputs["input_ids"].shape[1]
        with torch.no_grad():
            for _ in range(5):
                likeliest = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, likeliest[:, None]], 1)
        assert text == reward.judge.processor.tokenizer.decode(ids[0, asked:], skip_special_tokens=True)
    assert len(set(together)) > 1


def test_scores(reward, monkeypatch):
    """Each picture gets the rating of its answer; answers without one are NaN, which no batch may be altogether."""
    said = {"a red fox": "Final Score: 4.5", "two boat": "none", "a": "Final Score: 1"}
    asked = []

    def answer(judge, pictures, questions, max_new_tokens):
        asked.append((len(pictures), max_new_tokens))
        return [said[question.rsplit("[", 1)[1][:-1]] for question in questions]

    monkeypatch.setattr(module, "answers", answer)
    prompts = ["a red fox", "two boat", "a", "a"]
    scores = score_images(reward, images(), prompts).outputs["unified"].scores
    assert scores.tolist() == pytest.approx([4.5, math.nan, 1, 1], nan_ok=True)
    assert sorted(asked) == [(1, 5), (1, 5), (2, 5)]  # one length of question at a time
    with pytest.raises(RewardError, match="NaN"):
        score_images(reward, images(1), ["two boat"])


def test_batches(reward, monkeypatch):
    """At most `batch_size` at a time; order and size of batches change nothing."""
    monkeypatch.setattr(module, "answers", rated)
    batch = RewardBatch.from_images(example_images(6), ["a fox", "fox", "a red fox"] * 2)
    expected = reward.score(batch)
    sizes = []
    monkeypatch.setattr(module, "answers", lambda j, p, q, m: sizes.append(len(p)) or rated(j, p, q, m))
    small = UnifiedReward.__new__(UnifiedReward)
    vars(small).update(vars(reward), config=reward.config.model_copy(update={"batch_size": 1}))
    assert torch.equal(small.score(batch), expected)
    assert sizes == [1] * 6


def test_contract(reward, monkeypatch):
    """The reward keeps the SDK's contract, with answers that hold ratings."""
    monkeypatch.setattr(module, "answers", rated)
    check_reward(reward)


def test_control_tokens(reward):
    """A prompt that would put a second image into the question is not asked about."""
    assert reward.applies(["a fox", "a <image> fox"], {}) == [True, False]


def test_models_by_variant(monkeypatch):
    """Each question has its model; a processor without a chat template is an error before training."""
    asked = []

    class Judge:
        class processor:  # noqa: N801 - an attribute
            chat_template = None

    monkeypatch.setattr(module, "load_judge", lambda *given: asked.append(given) or Judge())
    for options in ({}, {"variant": "axes", "revision": "abc"}, {"path": "someone/judge", "dtype": "float16"}):
        with pytest.raises(RewardError, match=r"has no chat template.*chat_template\.jinja"):
            UnifiedReward(**options)
    assert asked == [
        ("CodeGoat24/UnifiedReward-qwen-7b", None, torch.bfloat16),
        ("CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", "abc", torch.bfloat16),
        ("someone/judge", None, torch.float16),
    ]
    with pytest.raises(RewardError, match="max_new_tokens"):
        UnifiedReward(max_new_tokens=0)
