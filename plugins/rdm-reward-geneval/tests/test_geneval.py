"""GenEval's reward on a tiny random OWLv2 and CLIP of the true classes."""

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rdm_reward_geneval.models import COLOR_TEXTS, colors_of, cropped, to_pil
from rdm_reward_geneval.reward import GenEval
from rdm_reward_geneval.rules import COLORS, Box
from torch.nn import functional as F
from transformers import CLIPModel, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing import check_reward, example_images, save_tiny_clip, tiny_tokenizer
from rdm_sdk.vision import ImageTransform

DOG = [{"class": "dog", "count": 1}]


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    """A tiny OWLv2 on disk."""
    folder, words = tmp_path_factory.mktemp("owl"), tiny_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 0}
    text = tower | ends | {"vocab_size": len(words), "max_position_embeddings": 16}
    vision = tower | {"image_size": 64, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
        for parameter in model.parameters():  # as small as they start, all boxes and kinds would be alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def make(owl, clip):
    return lambda **options: GenEval(path=owl, clip_path=clip, **({"threshold": 0.2} | options))


def batch(images, include, exclude=None):
    columns = {"include": include} | ({} if exclude is None else {"exclude": exclude})
    return RewardBatch.from_images(images, [""] * len(images), 1, columns)


def test_detections_are_those_of_transformers(make, owl):
    """Boxes, kinds and probabilities equal transformers' own processing, for images that are no squares."""
    reward, kinds = make(), ["dog", "a cat"]
    for height, width in ((48, 80), (90, 60)):
        images = example_images(2, height, width)
        found = reward.detector.find(images, kinds)
        processor = Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
        texts = tiny_tokenizer()(
            [f"a photo of a {kind}" for kind in kinds], padding="max_length", max_length=16, truncation=True
        )
        tokens = {name: torch.tensor(values * 2) for name, values in texts.items()}
        with torch.no_grad():
            pixels = processor(to_pil(images), return_tensors="pt").pixel_values
            output = Owlv2ForObjectDetection.from_pretrained(owl)(**tokens, pixel_values=pixels)
        sizes = [(height, width)] * 2
        expected = processor.post_process_object_detection(output, threshold=0, target_sizes=sizes)
        for ours, theirs in zip(found, expected, strict=True):
            for label, kind in enumerate(kinds):
                boxes = theirs["boxes"][theirs["labels"] == label]
                bounds = torch.tensor([width, height, width, height])
                expect = torch.cat(
                    [boxes.clamp(min=0).minimum(bounds), theirs["scores"][theirs["labels"] == label, None]], 1
                )
                assert torch.allclose(torch.tensor(ours[kind]).reshape(-1, 5), expect, atol=1e-3)
    assert all(len(found[0][kind]) for kind in kinds)


def test_colors_are_those_of_clip(make, clip):
    """A crop's color is that whose three texts, averaged, are nearest to it in a forward pass by transformers."""
    model, words, image = CLIPModel.from_pretrained(clip).eval(), tiny_tokenizer(), example_images(1, 60, 80)[0]
    boxes = [Box(0, 0, 30, 20, 1), Box(40.4, 10.6, 79.9, 59.7, 1), Box(20, 20, 20.2, 20.3, 1), Box(79.8, 3, 80, 60, 1)]
    classes = []
    with torch.no_grad():
        for color in COLORS:
            texts = [text.format(color=color, kind="dog") for text in COLOR_TEXTS]
            tokens = words(texts, padding=True, truncation=True, return_tensors="pt")
            classes.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).mean(0))
        crops = torch.cat([ImageTransform(32)(cropped(image, place)[None]) for place in boxes])
        seen = F.normalize(model.get_image_features(pixel_values=crops).pooler_output, dim=-1)
        expected = (seen @ F.normalize(torch.stack(classes), dim=-1).T).argmax(-1).tolist()
    assert colors_of(make().clip, image, "dog", boxes) == [COLORS[index] for index in expected]
    assert cropped(image, boxes[1]).shape == (3, 49, 40)
    assert cropped(image, boxes[2]).shape == (3, 1, 1)


def stubbed(reward, monkeypatch, boxes, color="red"):
    """Make the detector find written boxes, and all be of one color."""
    calls = []

    def find(images, kinds):
        calls.append((len(images), tuple(kinds)))
        return [{kind: boxes.get(kind, []) for kind in kinds} for _ in images]

    monkeypatch.setattr(reward.detector, "find", find)
    monkeypatch.setattr("rdm_reward_geneval.reward.colors_of", lambda *given: [color] * len(given[-1]))
    return calls


def test_scores(make, monkeypatch):
    """What is found becomes a score by the rules, with the threshold of the kind of prompt, in both variants."""
    places = [Box(0, 0, 10, 10, 0.9), Box(1, 0, 11, 10, 0.6), Box(100, 0, 110, 10, 0.5)]
    include = [DOG, [{"class": "dog", "count": 2}], [DOG[0] | {"color": "blue"}], None]
    images = example_images(4)
    for options, expected in (
        ({"threshold": 0.3, "counting_threshold": 0.3}, [0, 1, 0, torch.nan]),  # two dogs: one box overlaps the surest
        ({"threshold": 0.55, "counting_threshold": 0.3}, [1, 1, 0.5, torch.nan]),
        ({"threshold": 0.55, "counting_threshold": 0.55}, [1, 0.5, 0.5, torch.nan]),
        ({"variant": "strict", "threshold": 0.3, "counting_threshold": 0.3}, [1, 1, 0, torch.nan]),
        ({"threshold": 0.55, "counting_threshold": 0.55, "max_overlap": 1}, [0, 1, 0, torch.nan]),
    ):
        reward = make(**options)
        stubbed(reward, monkeypatch, {"dog": places})
        assert reward.score(batch(images, include)).tolist() == pytest.approx(expected, nan_ok=True)


def test_images_of_the_same_kinds_go_together(make, monkeypatch):
    """The detector sees a group at a time, at most `batch_size`, and each image gets its own boxes."""
    reward = make(batch_size=2)
    calls = stubbed(reward, monkeypatch, {"dog": [Box(0, 0, 9, 9, 0.9)]})
    cat = [{"class": "cat", "count": 1}]
    scores = reward.score(batch(example_images(5), [DOG, cat, DOG, DOG, DOG], [None, DOG, None, None, None]))
    assert calls == [(2, ("dog",)), (2, ("dog",)), (1, ("cat", "dog"))]
    assert scores.tolist() == [1, 0, 1, 1, 1]


def test_contract(make):
    """The reward keeps the SDK's contract."""
    check_reward(make(threshold=0.01, counting_threshold=0.01))
    check_reward(make(variant="strict", threshold=0.01, counting_threshold=0.01))


def test_rows_without_an_entry_and_wrong_ones(make):
    """Rows that ask for nothing are not judged; a wrong entry is found where a run asks before it trains."""
    reward = make()
    assert (reward.capabilities.columns, reward.capabilities.reads) == (("include",), ("exclude",))
    assert reward.applies(["", "", ""], {"include": [DOG, None, []]}) == [True, False, False]
    with pytest.raises(RewardError, match="color must be one of"):
        reward.applies([""], {"include": [[DOG[0] | {"color": "mauve"}]]})
    with pytest.raises(RewardError, match="column 'exclude'"):
        reward.applies([""], {"include": [DOG], "exclude": [7]})
    with pytest.raises(RewardError, match="needs a column 'include'"):
        score_images(reward, example_images(1), ["a dog"])
    result = score_images(reward, example_images(2), ["a dog", "a fox"], columns={"include": [DOG, None]})
    assert result.shown == {"geneval": 1}


def test_spec_and_options(owl, clip):
    """The variant is in the spec, and thresholds have ranges."""
    spec = f'geneval:strict[path="{owl}",clip_path="{clip}",threshold=0.2]'
    assert resolve_rewards(spec)[0].reward.config.variant == "strict"
    for option in ("threshold=1", "counting_threshold=0", "max_overlap=2", "batch_size=0"):
        with pytest.raises(RewardError, match=option.split("=")[0]):
            resolve_rewards(f'geneval[path="{owl}",{option}]')


def test_weights_that_cannot_be_had(monkeypatch, owl, clip, tmp_path):
    """A missing or other detector, and one without a tokenizer, are clear errors."""
    with pytest.raises(RewardError, match=r"does not fit OWLv2|cannot be loaded"):
        GenEval(path=clip, clip_path=clip)
    Owlv2ForObjectDetection.from_pretrained(owl).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="tokenizer"):
        GenEval(path=str(tmp_path), clip_path=clip)

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", fail)
    with pytest.raises(RewardError, match=r"'google/owlv2-base-patch16-ensemble' cannot be loaded.*no network"):
        GenEval()
