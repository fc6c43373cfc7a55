"""Soft-TIFA on a tiny random LLaVA, whose image processor runs on PIL, and on probabilities that are written down."""

import json
import math

import pytest
import torch
from rdm_reward_geneval.atoms import Atom, parse, soft_tifa, spellings
from rdm_reward_geneval.geneval2 import GenEval2
from transformers import LlavaForConditionalGeneration

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing import check_reward, reward_checks, save_tiny_llava

SIZE = 32
ASKED = "How many dogs boats are there any in the image ? Are red foxes Answer one word ."
WORDS = ["two", "Two", "2", "three", "Yes", "yes", "No", *ASKED.split(), ",", "these"]
VOCABULARY = list(dict.fromkeys(["<pad>", "<unk>", "<image>", "USER", "ASSISTANT", ":", *WORDS]))
ANY, COUNT = ["Are there any dogs in the image?", "Yes"], ["How many dogs are there?", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA on disk."""
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava"), VOCABULARY, image_size=SIZE))


@pytest.fixture(scope="module")
def make(folder):
    return lambda **options: GenEval2(path=folder, **({"dtype": "float32"} | options))


def images(count):
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 255


def batch(entries):
    return RewardBatch.from_images(images(len(entries)), None, 1, {"vqa_list": entries})


def by_hand(reward, folder, image, question, forms):
    """The probability that the first token of an answer is one of some, by a forward pass of transformers alone."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = reward.judge.processor.image_processor(image, return_tensors="pt", do_rescale=False).pixel_values
    words = f"USER : <image> {question} Answer in one word . ASSISTANT :".replace("?", " ?").split()
    ids = [VOCABULARY.index(w) for word in words for w in [word] * ((SIZE // 8) ** 2 if word == "<image>" else 1)]
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].double().softmax(-1)
    return float(sum(shares[VOCABULARY.index(form)] for form in forms))


def test_score_is_the_mean_of_probabilities(make, folder):
    """Each atom counts by the right answer's probability among all tokens, by a forward pass by hand."""
    entries = [[ANY, COUNT], [COUNT], [COUNT, ANY, ["Are the foxes red?", "No"]]]
    reward = make()
    parts = [
        [
            by_hand(
                reward,
                folder,
                image,
                question,
                {"Yes": ("Yes", "yes"), "two": ("two", "Two", "2"), "No": ("No",)}[answer],
            )
            for question, answer in entry
        ]
        for image, entry in zip(images(3), entries, strict=True)
    ]
    assert reward.score(batch(entries)).tolist() == pytest.approx([math.prod(p) ** (1 / len(p)) for p in parts])
    scores = score_images(make(variant="am"), images(3), ["fox"] * 3, columns={"vqa_list": entries})
    assert scores.outputs["geneval2"].scores.tolist() == pytest.approx([sum(p) / len(p) for p in parts])


def test_batches_change_nothing(make):
    """Questions of other lengths, other images and other batches leave scores as they are."""
    entries = [[ANY, COUNT], [COUNT], [ANY], [COUNT, ANY]]
    expected = torch.stack([make().score(batch(entries).select([row]))[0] for row in range(4)])
    for size in (1, 2, 100):
        assert torch.allclose(make(batch_size=size).score(batch(entries)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("probabilities", "geometric", "arithmetic"),
    [([0.5], 0.5, 0.5), ([1, 0.25], 0.5, 0.625), ([1, 1, 0], 0, 2 / 3), ([0.2] * 7, 0.2, 0.2)],
)
def test_means(probabilities, geometric, arithmetic):
    """The geometric mean is brought to 0 by one impossible answer, the arithmetic one is not."""
    logarithms = torch.tensor(probabilities, dtype=torch.float64).log()
    assert float(soft_tifa(logarithms, "gm")) == pytest.approx(geometric)
    assert float(soft_tifa(logarithms, "am")) == pytest.approx(arithmetic)


def test_spellings():
    """GenEval 2's forms of an answer: as a word, capitalized, after a space; a count as a digit, too."""
    assert set(spellings("Yes")) == {"Yes", "yes", " Yes", " yes"}
    assert set(spellings("four")) == {"four", "Four", "4", " four", " Four", " 4"}
    assert set(spellings("4")) == set(spellings("four"))
    assert set(spellings("red")) == {"red", "Red", " red", " Red"}
    assert "11" in spellings("11")


def test_entries():
    """Pairs, or the same as JSON text; nothing else."""
    pairs = [ANY, COUNT]
    assert (
        parse(pairs) == parse(json.dumps(pairs)) == parse([tuple(pair) for pair in pairs]) == [Atom(*p) for p in pairs]
    )
    assert parse(None) == parse([]) == parse("[]") == parse("null") == []
    for wrong in ("dogs", "3", 3, {"a": "b"}, ["a", "b"], [["a"]], [["a", ""]], [["a", 2]], [["a", "b", "c"]]):
        with pytest.raises(RewardError, match=r"geneval2: .*column 'vqa_list'"):
            parse(wrong)


def test_before_training(make):
    """Rows without questions are not judged; what cannot be asked or answered is found where a run asks first."""
    reward = make()
    assert reward.applies([""] * 4, {"vqa_list": [[ANY], None, [], json.dumps([COUNT])]}) == [True, False, False, True]
    for entry, words in (
        ([["Are there any <image>?", "Yes"]], "holds a control token"),
        ([["How many dogs?", "seven"]], r"no single token for 'seven' \(tried .*'7'"),
        ([["How many dogs?"]], "list of pairs"),
    ):
        with pytest.raises(RewardError, match=words):
            reward.applies([""], {"vqa_list": [entry]})
    with pytest.raises(RewardError, match="needs a column 'vqa_list'"):
        score_images(reward, images(1), ["a dog"])
    result = score_images(reward, images(2), ["dogs", "a fox"], columns={"vqa_list": [[ANY], None]})
    assert result.shown == {"geneval2": 1}
    assert result.outputs["geneval2"].scores.isnan().tolist() == [False, True]


def test_spec(folder):
    """The variant is in the spec."""
    (resolved,) = resolve_rewards(f'geneval2:am[path="{folder}",dtype=float32]')
    assert resolved.reward.config.variant == "am"
    with pytest.raises(RewardError, match="batch_size"):
        resolve_rewards(f'geneval2[path="{folder}",batch_size=0]')


def test_contract(make, monkeypatch):
    """The reward keeps the SDK's contract; its imports are those of `geneval` and `vlm`, which were looked at."""
    monkeypatch.setattr(reward_checks, "import_problem", lambda module: "")
    check_reward(make())
