"""The yes/no judge on a tiny random LLaVA, whose image processor runs on PIL."""

import json
import shutil

import pytest
import torch
from rdm_reward_vlm import judge
from rdm_reward_vlm.reward import VlmJudge
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.testing import check_reward, save_tiny_clip, save_tiny_llava, save_tiny_llava_processor
from rdm_sdk.testing.batches import PROMPTS as KIT_PROMPTS
from rdm_sdk.vision import CLIP_MEAN, CLIP_STD

SIZE, PATCH = 32, 8
PROMPTS = ["a red fox", "two boats at night", "a bowl", "an old wooden chair at night", "a red chair", "fox"]
QUESTION = 'Does this figure show " {} " ? Please answer yes or no .'
VOCABULARY = list(
    dict.fromkeys(
        ["<pad>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "Yes", "No", *QUESTION.split()]
        + [word for prompt in KIT_PROMPTS for word in prompt.split()]
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA on disk."""
    return save_tiny_llava(tmp_path_factory.mktemp("llava"), VOCABULARY, image_size=SIZE)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model on disk that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def make(folder, **options):
    return VlmJudge(path=str(folder), **({"dtype": "float32"} | options))


def images(count=6, height=SIZE, width=SIZE, seed=0):
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def by_hand(folder, image, words):
    """P(yes) / (P(yes) + P(no)) of one 8-bit image `[3, SIZE, SIZE]` and the words that the model is to read."""
    spread = []
    for word in words:
        spread += [word] * ((SIZE // PATCH) ** 2 if word == "<image>" else 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[VOCABULARY.index(word) for word in spread]]),
            pixel_values=((image - mean) / std)[None],
        ).logits
    probabilities = logits[0, -1].double().softmax(dim=-1)
    yes, no = (sum(probabilities[VOCABULARY.index(w)] for w in pair) for pair in (("Yes", "yes"), ("No", "no")))
    return float(yes / (yes + no))


def test_score_is_the_share_of_yes(folder):
    """Scores are the shares of yes that a forward pass by hand gives, one image at a time, without padding."""
    scores = score_images(f'vlm[path="{folder}", dtype=float32]', images(), PROMPTS).outputs["vlm"].scores
    for score, image, prompt in zip(scores.tolist(), images(), PROMPTS, strict=True):
        words = ["USER", ":", "<image>", *QUESTION.format(prompt).split(), "ASSISTANT", ":"]
        assert score == pytest.approx(by_hand(folder, image, words), abs=1e-5)
    assert scores.std() > 0.01


def test_batches_and_order_do_not_matter(folder):
    """Batches of any size, questions of other lengths among them, give the same scores; so does any order."""
    pictures, prompts = images(12), PROMPTS * 2
    one = make(folder, batch_size=1).score(RewardBatch.from_images(pictures, prompts))
    for size in (2, 3, 100):
        many = make(folder, batch_size=size).score(RewardBatch.from_images(pictures, prompts))
        assert torch.allclose(many, one, atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = RewardBatch.from_images(pictures[order], [prompts[i] for i in order])
    assert torch.allclose(make(folder).score(shuffled), one[order], atol=1e-6)
    swapped = make(folder).score(RewardBatch.from_images(pictures, prompts[::-1]))
    assert (swapped - one).abs().max() > 1e-3


def test_without_a_chat_template(copy):
    """A processor without a template is given the image's place and the bare question."""
    (copy / "chat_template.jinja").unlink()
    reward = make(copy, question="show {prompt} ?")
    scores = reward.score(RewardBatch.from_images(images(2), ["a red fox", "fox"]))
    for score, image, words in zip(scores.tolist(), images(2), ("show a red fox ?", "show fox ?"), strict=True):
        assert score == pytest.approx(by_hand(copy, image, ["<image>", *words.split()]), abs=1e-5)


def test_contract(folder):
    """The reward keeps the SDK's contract."""
    check_reward(make(folder))


def test_a_control_token_in_a_prompt(folder):
    """A prompt that would put a second image into the question is not applicable, and spoils no other."""
    clean = make(folder).score(RewardBatch.from_images(images(2), ["fox", "a bowl"]))
    mixed = make(folder).score(RewardBatch.from_images(images(2), ["fox", "a <image> bowl"]))
    assert torch.allclose(mixed[:1], clean[:1])
    assert mixed[1].isnan()


def test_default_dtype_and_braces(folder):
    """Weights are bfloat16 by default, scores float32; braces in questions and prompts mean nothing else."""
    reward = VlmJudge(path=str(folder), question="{a} show {prompt} ? {}")
    assert reward.judge.model.dtype == torch.bfloat16
    scores = reward.score(RewardBatch.from_images(images(2, 40, 56), ["{prompt} fox", "{0}"]))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_question_without_the_prompt(folder):
    """A question that never mentions the prompt is an error that names the option."""
    with pytest.raises(RewardError, match=r"vlm.*question.*must contain \{prompt\}"):
        score_images(f'vlm[path="{folder}", question="Is it good?"]', images(1), ["fox"])
    with pytest.raises(RewardError, match="batch_size"):
        make(folder, batch_size=0)


def test_answers_that_are_no_tokens(copy):
    """A tokenizer that cannot say yes in one token is an error that says so."""
    words = [{"Yes": "Y", "yes": "y"}.get(word, word) for word in VOCABULARY]
    save_tiny_llava_processor(copy, words, SIZE)
    with pytest.raises(RewardError, match=r"no single token for 'Yes'"):
        make(copy)


def test_wrong_models(folder, copy, tmp_path):
    """Models without images or text, with a decoder apart, or with missing weights are clear errors."""
    with pytest.raises(RewardError, match=r"type 'clip'.*does not read images and write text.*path="):
        make(save_tiny_clip(tmp_path / "clip"))
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "config.json").write_text(json.dumps({"model_type": "pix2struct", "is_encoder_decoder": True}))
    with pytest.raises(RewardError, match=r"pix2struct.*separate decoder"):
        make(apart)
    with pytest.raises(RewardError, match=r"cannot be loaded.*path="):
        make(tmp_path / "nowhere")
    tensors = load_file(copy / "model.safetensors")
    gone = next(name for name in tensors if "layers.1" in name and "q_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"does not fit llava: missing \['.*q_proj"):
        make(copy)
    (copy / "model.safetensors").write_text("these are no weights")
    with pytest.raises(RewardError, match=r"cannot be loaded.*path="):
        make(copy)


def test_processors_that_cannot_be_loaded(folder, copy, monkeypatch):
    """A missing processor is an error, which points to torchvision where that is missing."""
    (copy / "processor_config.json").unlink()
    with pytest.raises(RewardError, match="processor"):
        make(copy)

    def fail(*_, **__):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(judge.AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"processor of .* cannot be loaded.*torchvision is not installed"):
        make(folder)
