"""ImageReward on tiny random weights under the names of the original BLIP code."""

import json
from itertools import pairwise

import pytest
import torch
from rdm_reward_imagereward.model import BLIP_LARGE, ImageRewardNet, convert_blip
from rdm_reward_imagereward.reward import ImageReward
from torch.nn import functional as F
from transformers import BertTokenizer, BlipConfig

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.testing import check_reward
from rdm_sdk.vision import ImageTransform

WIDTH, TEXT_WIDTH, HEADS, LAYERS, SIZE, PATCH = 24, 32, 4, 2, 32, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
PROMPTS = ["a red fox", "two boats at night", "x", "a long prompt of which the end is cut off by the model"]


def architecture():
    """The tiny model's `config.json`."""
    tower = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    vision = tower | {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": SIZE, "patch_size": PATCH}
    text = tower | {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "vocab_size": len(VOCABULARY) + 2}
    return {
        "vision_config": vision | {"layer_norm_eps": 1e-6},
        "text_config": text | {"layer_norm_eps": 1e-12, "max_position_embeddings": 40},
    }


def checkpoint(seed=0):
    """A random state as the original code would save it, with all that such a file holds besides."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape, scale=0.2, mean=0.0):
        tensors[name] = mean + scale * torch.randn(*shape, generator=generator)

    def linear(name, inputs, outputs):
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name, width):
        add(f"{name}.weight", width, mean=1.0)
        add(f"{name}.bias", width)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    # Small embeddings, so that the epsilon of the first normalizations is felt.
    add(f"{eye}.cls_token", 1, 1, WIDTH, scale=0.005)
    add(f"{eye}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, WIDTH, scale=0.005)
    add(f"{eye}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, scale=0.0005)
    add(f"{eye}.patch_embed.proj.bias", WIDTH, scale=0.005)
    norm(f"{eye}.norm", WIDTH)
    add(f"{text}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, TEXT_WIDTH, scale=0.003)
    add(f"{text}.embeddings.position_embeddings.weight", 40, TEXT_WIDTH, scale=0.003)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(LAYERS):
        block, layer = f"{eye}.blocks.{i}", f"{text}.encoder.layer.{i}"
        for name in ("norm1", "norm2"):
            norm(f"{block}.{name}", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
        for attention, looked_at in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.key", looked_at, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.value", looked_at, TEXT_WIDTH)
            linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 4 * TEXT_WIDTH)
        linear(f"{layer}.output.dense", 4 * TEXT_WIDTH, TEXT_WIDTH)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    for index, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise((TEXT_WIDTH, 1024, 128, 64, 16, 1)), strict=True):
        linear(f"mlp.layers.{index}", inputs, outputs)
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    linear("blip.vision_proj", WIDTH, 16)
    linear("blip.text_proj", TEXT_WIDTH, 16)
    return tensors


def save(folder, tensors):
    """Write a checkpoint with its architecture and tokenizer, and return its path."""
    (folder / "config.json").write_text(json.dumps(architecture()))
    BertTokenizer(vocab={entry: i for i, entry in enumerate(VOCABULARY)}).save_pretrained(folder)
    torch.save(tensors, folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ImageReward on disk."""
    return save(tmp_path_factory.mktemp("imagereward"), checkpoint())


def images(count=4, height=40, width=48, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Oracle:
    """The original forward pass, in nothing but torch, on the original names."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x, name, epsilon):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    @staticmethod
    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    @staticmethod
    def attend(q, k, v, keep=None):
        """Attention `[L, D]` of one sample; `keep` `[L]` says which keys are no padding."""
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if keep is not None:
            logits = logits.masked_fill(~keep, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def patches(self, pixels):
        """Image tokens `[1 + P, D]` of preprocessed pixels `[3, S, S]`."""
        own = "blip.visual_encoder"
        cut = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
        x = cut @ self.tensors[f"{own}.patch_embed.proj.weight"].flatten(1).T
        x = x + self.tensors[f"{own}.patch_embed.proj.bias"]
        x = torch.cat([self.tensors[f"{own}.cls_token"][0], x]) + self.tensors[f"{own}.pos_embed"][0]
        for i in range(LAYERS):
            block = f"{own}.blocks.{i}"
            q, k, v = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
            x = x + self.linear(self.attend(q, k, v), f"{block}.attn.proj")
            hidden = self.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.norm(x, f"{own}.norm", 1e-6)

    def score(self, pixels, tokens):
        """The standardized score of one image and its padded token ids `[L]`."""
        own, seen = "blip.text_encoder", self.patches(pixels.double())
        x = self.tensors[f"{own}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.tensors[f"{own}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(x, f"{own}.embeddings.LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"{own}.encoder.layer.{i}"
            for part, source, keep in (("attention", None, tokens != 0), ("crossattention", seen, None)):
                source = x if source is None else source
                q = self.linear(x, f"{layer}.{part}.self.query")
                k, v = (self.linear(source, f"{layer}.{part}.self.{name}") for name in ("key", "value"))
                out = self.linear(self.attend(q, k, v, keep), f"{layer}.{part}.output.dense")
                x = self.norm(out + x, f"{layer}.{part}.output.LayerNorm", 1e-12)
            hidden = self.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(self.linear(hidden, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm", 1e-12)
        x = x[0]
        for index in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{index}")
        return (x[0] - 0.16717362830052426) / 1.0333394966054072


def spelled(prompt):
    """Token ids of a prompt in letters: [CLS], its letters, [SEP], padded to 35."""
    words = [[letter if i == 0 else f"##{letter}" for i, letter in enumerate(word)] for word in prompt.split()]
    entries = ["[CLS]", *[piece for word in words for piece in word][:33], "[SEP]"]
    return torch.tensor([VOCABULARY.index(entry) for entry in entries] + [0] * (35 - len(entries)))


def test_score_is_the_original_forward_pass(folder):
    """The score of converted weights is that of a forward pass on the original names, written independently."""
    ours = score_images(f'imagereward[path="{folder}"]', images(), PROMPTS).outputs["imagereward"].scores
    oracle, pixels = Oracle(checkpoint()), ImageTransform(SIZE)(images())
    theirs = torch.stack([oracle.score(*pair) for pair in zip(pixels, map(spelled, PROMPTS), strict=True)]).float()
    scale = theirs.abs().max()
    assert torch.allclose(ours / scale, theirs / scale, atol=1e-5, rtol=0)
    assert ours.std() > 0.01 * scale


def test_gradient_and_ascent(folder):
    """The gradient with respect to the images is the oracle's, and a step along it raises every score."""
    reward, start = ImageReward(path=str(folder)), images()
    gradient = evaluate_reward(reward, RewardBatch.from_images(start, PROMPTS)).gradient
    leaf, oracle = start.clone().requires_grad_(), Oracle(checkpoint())
    sum(oracle.score(*pair) for pair in zip(ImageTransform(SIZE)(leaf), map(spelled, PROMPTS), strict=True)).backward()
    assert torch.allclose(gradient, leaf.grad, atol=1e-5 * float(leaf.grad.abs().max()))
    before = reward.score(RewardBatch.from_images(start, PROMPTS))
    uphill = (start + 0.02 * F.normalize(gradient.flatten(1), p=torch.inf).view_as(start)).clamp(0, 1)
    assert (reward.score(RewardBatch.from_images(uphill, PROMPTS)) > before).all()


def test_contract(folder):
    """The reward keeps the SDK's contract."""
    check_reward(ImageReward(path=str(folder)))


def test_half_precision_and_file_path(folder):
    """A path may be the file itself; encoders in bfloat16 with a float32 head give scores close by."""
    full = ImageReward(path=str(folder / "ImageReward.pt"))
    half = ImageReward(path=str(folder), dtype="bfloat16")
    batch = RewardBatch.from_images(images(), PROMPTS)
    a, b = (evaluate_reward(reward, batch, gradients_of=()).scores for reward in (full, half))
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


def test_the_real_architecture_has_the_published_size():
    """The default architecture, with the unused projections, has as many bytes as the published file, but for names."""
    with torch.device("meta"):
        network = ImageRewardNet(BlipConfig(**BLIP_LARGE))
    unused = (1024 + 1) * 256 + (768 + 1) * 256
    size = 4 * (sum(parameter.numel() for parameter in network.parameters()) + unused) + 8 * 512
    assert size == 1_786_667_908
    assert network.text.config.num_attention_heads == 12
    assert network.text.config.encoder_hidden_size == network.vision.config.hidden_size


def broken(change):
    def make():
        tensors = checkpoint()
        change(tensors)
        return tensors

    return make


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken(lambda t: t.pop("blip.visual_encoder.blocks.1.attn.qkv.weight")), r"missing: vision.*layers\.1.*qkv"),
        (broken(lambda t: t.update({"mlp.layers.0.weight": torch.zeros(1024, 8)})), r"shape \[1024, 8\], expected"),
        (broken(lambda t: t.update({"mlp.layers.1.weight": torch.zeros(1)})), r"'mlp\.layers\.1\.weight'"),
        (broken(lambda t: t.update({"visual.proj": torch.zeros(1)})), r"holds 'visual\.proj'.*another model"),
        (lambda: {"blip": Code()}, "cannot read the weights"),
        (lambda: [1, 2], "mapping of names to tensors"),
    ],
)
def test_wrong_checkpoints(tmp_path, capsys, make, message):
    """What does not fit is named, and a pickle runs nothing."""
    with pytest.raises(RewardError, match=message):
        ImageReward(path=str(save(tmp_path, make())))
    assert "ran code" not in capsys.readouterr().out


def test_wrong_files(tmp_path, folder):
    """A text file, a folder without weights, a wrong config.json and a tokenizer that is too large are clear errors."""
    (tmp_path / "notes.pt").write_text("these are no weights")
    with pytest.raises(RewardError, match=r"cannot read the weights.*notes\.pt"):
        ImageReward(path=str(tmp_path / "notes.pt"))
    with pytest.raises(RewardError, match=r"neither the file itself nor 'ImageReward\.pt'"):
        ImageReward(path=str(tmp_path))
    save(tmp_path, checkpoint())
    wrong = architecture()
    wrong["vision_config"]["num_attention_heads"] = 5
    for content in ("no JSON", '{"model_type": "clip"}', json.dumps(wrong)):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RewardError, match=r"config\.json.*BlipConfig"):
            ImageReward(path=str(tmp_path))
    more = tmp_path / "more"
    BertTokenizer(vocab={str(i): i for i in range(200)} | {"[UNK]": 200}).save_pretrained(more)
    with pytest.raises(RewardError, match=r"has \d+ tokens.*only 59"):
        ImageReward(path=str(folder), tokenizer=str(more))
    with pytest.raises(RewardError, match=r"nowhere.*cannot be loaded"):
        ImageReward(path=str(folder), tokenizer=str(tmp_path / "nowhere"))


def test_names_of_a_wrapped_model():
    """A checkpoint saved from a data-parallel wrapper has a prefix, which means nothing."""
    tensors = checkpoint()
    assert convert_blip({f"module.{name}": tensor for name, tensor in tensors.items()}).keys() == (
        convert_blip(tensors).keys()
    )
