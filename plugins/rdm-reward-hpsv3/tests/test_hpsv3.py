"""HPSv3 on a tiny random Qwen2-VL of the true class, with the checkpoint's names and the true text."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rdm_reward_hpsv3 import model as module
from rdm_reward_hpsv3.model import patches, prepare, renamed, resized
from rdm_reward_hpsv3.reward import BASE, FILE, HUB, HumanPreferenceScore3
from rdm_reward_hpsv3.text import REWARD_TOKEN, after_image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.testing import check_reward, example_images, save_tiny_clip, tiny_qwen_tokenizer
from rdm_sdk.vision import preprocess

CONTROLS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red fox", "two boats at night", "a bowl of {green} apples", "fox"]
WIDTH = 32


def tokenizer():
    """Qwen's way to cut texts, with the text's words as one token each, and its control tokens."""
    found = tiny_qwen_tokenizer(after_image("") + "<|x|>system\nYou are a helpful assistant.<|x|>user\n")
    found.add_tokens(CONTROLS, special_tokens=True)
    return found


def config(tokens):
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    text = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    return Qwen2VLConfig(
        vision_config=vision,
        text_config=text | rope | {"num_key_value_heads": 1, "vocab_size": tokens, "layer_types": None},
        image_token_id=tokens - 2,
    )


def make_tensors(architecture):
    """Random weights with the names of today's transformers, and the head's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Qwen2VLForConditionalGeneration(architecture)
        head = nn.Sequential(
            nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        for part in (network, head):
            for parameter in part.parameters():  # as small as they start, images and prompts would hardly matter
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=1.4 * parameter[0].numel() ** -0.5)
    found = network.state_dict() | {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def old_name(name):
    """A name as transformers before 4.52 had it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with config and tokenizer, as Qwen's repository has them."""
    folder = tmp_path_factory.mktemp("qwen")
    words = tokenizer()
    words.save_pretrained(folder)
    config(len(words) + 40).save_pretrained(folder)  # the published embedding has rows that no token uses
    return folder


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(config(len(tokenizer()) + 1))


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("hpsv3") / FILE
    save_file({old_name(name): tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def reward(base, file):
    """A reward that looks at small images, which is all that makes it faster."""
    found = HumanPreferenceScore3(path=str(file), base=str(base), dtype="float32")
    found.pixels = 4 * 28 * 28
    return found


def images(count=4, height=56, width=56):
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255


def to_pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def by_hand(tensors, image, prompt, pixels):
    """The score of one image by transformers' own model with a language head, HPSv3's full text, and PIL."""
    words = tokenizer()
    words.add_tokens([REWARD_TOKEN], special_tokens=True)
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    seen = Qwen2VLImageProcessorPil(size=size)(images=[to_pil(image)], return_tensors="pt")
    places = "<|image_pad|>" * int(seen.image_grid_thw.prod() // 4)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{places}{after_image(prompt)}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = words(text, return_tensors="pt").input_ids
    network = Qwen2VLForConditionalGeneration(config(len(words))).eval()
    network.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("rm_head")})
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        found = network(ids, position_ids=positions, **seen, output_hidden_states=True).hidden_states[-1]
        state = found[ids == words.convert_tokens_to_ids(REWARD_TOKEN)]
        for layer in (0, 3, 5):
            state = state @ tensors[f"rm_head.{layer}.weight"].T + tensors[f"rm_head.{layer}.bias"]
            state = state.relu() if layer < 5 else state
    return float(state[0, 0])


def test_text():
    """The text is the original's to the letter, spaces at the ends of lines included."""
    text = after_image("a fox")
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "6e38650fae1ed198b236ccb57bb4df075d7dab44c5cc55173acff0afd7b0a38c"
    )
    assert text.endswith("Textual prompt - a fox\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>")


def test_score(reward, tensors):
    """Scores are those of transformers' own forward pass over the whole text, without padding, one at a time."""
    for size, tolerance in (((56, 56), 2e-5), ((40, 70), 1e-2)):  # as it is, and resized, where PIL rounds otherwise
        pictures = images(4, *size)
        scores = reward.score(RewardBatch.from_images(pictures, PROMPTS))
        for score, image, prompt in zip(scores.tolist(), pictures, PROMPTS, strict=True):
            assert score == pytest.approx(by_hand(tensors, image, prompt, reward.pixels), abs=tolerance)
        assert scores.std() > 0.1


@pytest.mark.parametrize("size", [(300, 260), (512, 512), (64, 640), (30, 31)])
def test_patches_are_those_of_transformers(size):
    """Patches, their order and the grid equal those of transformers' processor on PIL, up to rounding to 8 bits."""
    pictures = example_images(2, *size)
    limits = {"shortest_edge": module.PIXELS, "longest_edge": module.PIXELS}
    expected = Qwen2VLImageProcessorPil(size=limits)(images=[to_pil(image) for image in pictures], return_tensors="pt")
    ours, grid = patches(prepare(pictures, 28), Qwen2VLConfig().vision_config)
    assert [[1, *grid]] * 2 == expected.image_grid_thw.tolist()
    difference = (ours.flatten(0, 1) - expected.pixel_values).abs() * 255 * 0.27
    assert difference.max() < 1.1  # a level, where PIL's fixed-point arithmetic falls on the other side
    assert difference.mean() < 0.02


def test_size_of_images():
    """About 256 tokens for any shape, sides of multiples of 28; too narrow ones are refused."""
    for height, width in ((512, 512), (1024, 768), (100, 100), (200, 900), (28, 3000)):
        found = resized(height, width, 28, module.PIXELS)
        assert all(side % 28 == 0 and side for side in found)
        assert 0.7 < np.prod(found) / module.PIXELS < 1.3
    assert resized(512, 512, 28, module.PIXELS) == (448, 448)
    with pytest.raises(RewardError, match=r"10 x 2001 pixels: .*200 times"):
        resized(10, 2001, 28, module.PIXELS)


def test_padding_changes_nothing(reward):
    """A prompt's score does not depend on the lengths of those beside it, nor on their order."""
    together = reward.score(RewardBatch.from_images(images(), PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = reward.score(RewardBatch.from_images(images()[row : row + 1], [prompt]))
        assert torch.allclose(alone, together[row : row + 1], atol=1e-5)
    swapped = reward.score(RewardBatch.from_images(images(), PROMPTS[::-1]))
    assert (swapped - together).abs().max() > 1e-3


def test_gradient(reward, monkeypatch):
    """Without the rounding, the gradient is what a small step changes; with it, about the same, and it reaches all."""
    pictures, prompts = example_images(2, 120, 90), ["a red fox", "two boats"]
    rounded = evaluate_reward(reward, RewardBatch.from_images(pictures, prompts)).gradient
    for place in (module, preprocess):
        monkeypatch.setattr(place, "to_8_bits", lambda images: images)
    exact = evaluate_reward(reward, RewardBatch.from_images(pictures, prompts)).gradient
    way = F.normalize(exact.flatten(1), dim=1).view_as(exact)
    up, down = (reward.score(RewardBatch.from_images(pictures + step * way, prompts)) for step in (2e-3, -2e-3))
    slope = (exact * way).flatten(1).sum(1)
    assert torch.allclose((up - down) / 4e-3, slope, rtol=0.05)
    assert (F.cosine_similarity(rounded.flatten(1), exact.flatten(1)) > 0.85).all()
    assert (rounded.abs().amax(1) > 0).float().mean() > 0.9


def test_contract(reward, monkeypatch):
    """The reward keeps the SDK's contract (with a shorter text, which is faster)."""
    for part in ("_QUALITY", "_ALIGNMENT"):
        monkeypatch.setattr(f"rdm_reward_hpsv3.text.{part}", "")
    check_reward(reward)


def test_both_layouts_and_half_precision(base, tensors, reward, tmp_path):
    """Checkpoints with the names of old and of today's transformers are the same; the head stays float32."""
    save_file(tensors, tmp_path / FILE)
    full, half = (
        HumanPreferenceScore3(path=str(tmp_path), base=str(base), dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    full.pixels = half.pixels = reward.pixels
    batch = RewardBatch.from_images(images(), PROMPTS)
    assert torch.equal(full.score(batch), reward.score(batch))
    network = half.scorer.network
    assert (network.dtype, network.rm_head[0].weight.dtype) == (torch.bfloat16, torch.float32)
    assert not any("lm_head" in name for name in network.state_dict())
    assert half.score(batch).dtype == torch.float32
    assert (half.score(batch) - full.score(batch)).abs().max() < 0.3
    assert HumanPreferenceScore3.Config().dtype == "bfloat16"


def test_names():
    """Old names become today's, and today's stay as they are."""
    names = ["model.layers.0.x", "model.embed_tokens.weight", "visual.blocks.0.x", "rm_head.0.bias", "lm_head.weight"]
    new = renamed(dict.fromkeys(names, torch.zeros(1)))
    assert list(new) == [
        "model.language_model.layers.0.x",
        "model.language_model.embed_tokens.weight",
        "model.visual.blocks.0.x",
        "rm_head.0.bias",
    ]
    assert list(renamed(new)) == list(new)


def test_control_tokens(reward):
    """A prompt that would put another image or score into the text is not judged, and spoils no other."""
    prompts = ["a fox", "a <|Reward|> fox", "a <|image_pad|> fox"]
    scored = score_images(reward, images(3), prompts)
    assert scored.shown == {"hpsv3": 1}
    alone = score_images(reward, images(1), prompts[:1]).outputs["hpsv3"].scores
    assert torch.allclose(scored.outputs["hpsv3"].scores[:1], alone, atol=1e-5)


def test_from_the_hub(monkeypatch, file):
    """Without options, the file is asked of the authors' repository and the rest of Qwen's."""
    asked = []

    def download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        return str(file)

    def load(source):
        asked.append(source)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(module.AutoConfig, "from_pretrained", load)
    with pytest.raises(RewardError, match=r"Qwen2-VL 'Qwen/Qwen2-VL-7B-Instruct' cannot be loaded: .*no network"):
        HumanPreferenceScore3(revision="abc")
    assert asked == [(HUB, FILE, "abc"), BASE]


def test_wrong_checkpoints(base, tensors, tmp_path):
    """Missing, surplus and misshapen tensors, other models and another tokenizer are clear errors."""

    def refused(found, message, where=base):
        save_file(found, tmp_path / FILE)
        with pytest.raises(RewardError, match=message):
            HumanPreferenceScore3(path=str(tmp_path), base=str(where), dtype="float32")

    gone = "model.visual.blocks.1.norm1.weight"
    refused({n: t for n, t in tensors.items() if n != gone}, rf"does not fit .*missing: {gone} \(1\)")
    refused(tensors | {"model.visual.more": torch.zeros(1)}, r"not expected: model\.visual\.more")
    refused(tensors | {"rm_head.5.weight": torch.zeros(4, 16)}, r"of another shape: rm_head\.5\.weight")
    refused({n: t for n, t in tensors.items() if not n.startswith("rm_head")}, r"lacks .*HPSv3's head")
    rows = tensors["model.language_model.embed_tokens.weight"]
    refused(tensors | {"model.language_model.embed_tokens.weight": rows[:-1].clone()}, r"does not fit.*tokens.*base=")
    refused(tensors, r"type 'clip'; hpsv3 needs a Qwen2-VL", save_tiny_clip(tmp_path / "clip"))
    plain = tmp_path / "plain"
    tiny_qwen_tokenizer().save_pretrained(plain)
    (plain / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text())))
    refused(tensors, r"has no token <\|vision_start\|>", plain)
    with pytest.raises(RewardError, match=r"no weights at .*HPSv3\.safetensors"):
        HumanPreferenceScore3(path=str(tmp_path / "nowhere"))
