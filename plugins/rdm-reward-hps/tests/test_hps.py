"""HPS on tiny random CLIPs with open_clip's names, and on the names and shapes of the true one."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from rdm_reward_hps.reward import FILES, HUB, HumanPreferenceScore, cleaned
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.testing import check_reward, save_tiny_clip, tiny_clip_config, tiny_tokenizer
from rdm_sdk.vision import CLIP_VIT_H, convert_open_clip

PROMPTS = ["a", "bc d", "a d", "a prompt that is far too long for sixteen tokens"]
CODE_RAN = []


def shapes_of(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP (its class `CLIP`) of an architecture."""
    text, vision, out = config.text_config, config.vision_config, config.projection_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes = {
        "logit_scale": (),
        "positional_embedding": (text.max_position_embeddings, text.hidden_size),
        "text_projection": (text.hidden_size, out),
        "token_embedding.weight": (text.vocab_size, text.hidden_size),
        "visual.class_embedding": (vision.hidden_size,),
        "visual.positional_embedding": (patches + 1, vision.hidden_size),
        "visual.proj": (vision.hidden_size, out),
        "visual.conv1.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
    }
    norms = {"visual.ln_pre": vision.hidden_size, "visual.ln_post": vision.hidden_size, "ln_final": text.hidden_size}
    for tower, prefix in ((text, "transformer"), (vision, "visual.transformer")):
        width, inner = tower.hidden_size, tower.intermediate_size
        for i in range(tower.num_hidden_layers):
            block = f"{prefix}.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, (outputs, inputs) in {
                "attn.in_proj_": (3 * width, width),
                "attn.out_proj.": (width, width),
                "mlp.c_fc.": (inner, width),
                "mlp.c_proj.": (width, inner),
            }.items():
                shapes |= {f"{block}.{name}weight": (outputs, inputs), f"{block}.{name}bias": (outputs,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tiny CLIP of random weights, biases and gains, with open_clip's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(tiny_clip_config())
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


def save(folder: Path, content: object, name: str = FILES["v2.1"]) -> Path:
    """Write a checkpoint with architecture and tokenizer beside it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_clip_config().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.save(content, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    """A tiny checkpoint of v2.1 as the hub has it."""
    return save(tmp_path_factory.mktemp("hps"), {"epoch": 1, "state_dict": tensors})


def attention_by_hand(x, weights, prefix, heads, mask):
    qkv = x @ weights[f"{prefix}.in_proj_weight"].T + weights[f"{prefix}.in_proj_bias"]
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    attended = ((q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    return attended @ weights[f"{prefix}.out_proj.weight"].T + weights[f"{prefix}.out_proj.bias"]


def attention_of_torch(x, weights, prefix, heads, mask):
    layer = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True).eval()
    layer.load_state_dict({name: weights[f"{prefix}.{name}"] for name in layer.state_dict()})
    return layer(x, x, x, attn_mask=mask, need_weights=False)[0]


def tower(x, weights, prefix, heads, mask, attention):
    """open_clip's residual attention blocks, pre-norm with GELU; x is [N, L, width]."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    for i in range(2):
        block = f"{prefix}transformer.resblocks.{i}"
        x = x + attention(norm(x, f"{block}.ln_1"), weights, f"{block}.attn", heads, mask)
        inner = norm(x, f"{block}.ln_2") @ weights[f"{block}.mlp.c_fc.weight"].T + weights[f"{block}.mlp.c_fc.bias"]
        x = x + F.gelu(inner) @ weights[f"{block}.mlp.c_proj.weight"].T + weights[f"{block}.mlp.c_proj.bias"]
    return norm(x, f"{prefix}ln_post" if prefix else "ln_final")


def images_by_hand(weights, pixels, attention):
    """Embeddings of images [N, 3, 32, 32] as open_clip computes them: unit vectors [N, 16]."""
    conv = weights["visual.conv1.weight"]
    patches = F.unfold(pixels, conv.shape[-1], stride=conv.shape[-1]).mT @ conv.flatten(1).T
    first = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + weights["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"])
    x = tower(x, weights, "visual.", 2, torch.zeros(x.shape[1], x.shape[1]), attention)
    return F.normalize(x[:, 0] @ weights["visual.proj"], dim=-1)


def prompts_by_hand(weights, prompts, attention):
    """Embeddings of prompts as open_clip computes them, padded with token 0 and read at the highest token."""
    rows = [tiny_tokenizer()(prompt, truncation=True, max_length=16).input_ids for prompt in prompts]
    tokens = torch.tensor([row + [0] * (16 - len(row)) for row in rows])
    causal = torch.full((16, 16), -torch.inf).triu(1)
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = tower(x, weights, "", 2, causal, attention)
    return F.normalize(x[range(len(x)), tokens.argmax(dim=-1)] @ weights["text_projection"], dim=-1)


@pytest.mark.parametrize("attention", [attention_by_hand, attention_of_torch])
def test_converted_model_is_open_clips(file, tensors, attention):
    """Embeddings, and so scores, are those of an independent forward pass on the checkpoint's own tensors."""
    reward = HumanPreferenceScore(path=str(file))
    images = torch.rand(4, 3, 41, 64, generator=torch.Generator().manual_seed(0))
    pixels = reward.transform(images)
    with torch.no_grad():
        wanted_images = images_by_hand(tensors, pixels, attention)
        wanted_prompts = prompts_by_hand(tensors, PROMPTS, attention)
        found_images, found_prompts = reward.encoder.embed_images(pixels), reward.encoder.embed_prompts(PROMPTS)
    assert (found_images - wanted_images).abs().max() < 1e-5
    assert (found_prompts - wanted_prompts).abs().max() < 1e-5
    scores = score_images(f'hps[path="{file}"]', images, PROMPTS).outputs["hps"].scores
    assert torch.allclose(scores, (wanted_images * wanted_prompts).sum(-1), atol=1e-5)
    assert scores.std() > 1e-3


def test_true_architecture_takes_every_tensor():
    """open_clip's names and shapes of ViT-H/14, 986.11 million numbers, are the model's own after conversion."""
    config = CLIPConfig(**CLIP_VIT_H)
    with torch.device("meta"):
        own = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
        theirs = {name: torch.empty(shape) for name, shape in shapes_of(config).items()}
    assert {name: tensor.shape for name, tensor in convert_open_clip(theirs).items()} == own
    assert round(sum(tensor.numel() for tensor in theirs.values()) / 1e6, 2) == 986.11
    assert shapes_of(config)["visual.positional_embedding"] == (257, 1280)
    assert shapes_of(config)["positional_embedding"] == (77, 1024)


@pytest.mark.parametrize(("height", "width"), [(37, 53), (333, 97), (224, 224), (31, 224), (301, 300), (1, 90)])
def test_preprocessing_is_pils(height, width):
    """The longer side becomes 224 as PIL resizes it, and the rest is black before normalization."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = 224 / max(height, width)
    fitted = round(height * scale), round(width * scale)
    picture = Image.fromarray(pixels)
    # Two calls, because since Pillow 13 one call resizes tall images by height first; the models were trained before.
    narrowed = picture.resize((fitted[1], height), Image.Resampling.BICUBIC)
    resized = np.asarray(narrowed.resize(fitted[::-1], Image.Resampling.BICUBIC))
    if height <= 2 * width:
        assert (resized == np.asarray(picture.resize(fitted[::-1], Image.Resampling.BICUBIC))).all()
    wanted = np.zeros((224, 224, 3), np.uint8)
    top, left = (224 - fitted[0]) // 2, (224 - fitted[1]) // 2
    wanted[top : top + fitted[0], left : left + fitted[1]] = resized
    transform = replace(HumanPreferenceScore.transform, mean=(0, 0, 0), std=(1, 1, 1))
    found = transform(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0)
    assert np.abs(found.numpy() * 255 - wanted).mean() <= 0.01


def test_normalization_follows_the_padding():
    """Black padding is normalized like the picture."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    corner = HumanPreferenceScore.transform(torch.ones(1, 3, 10, 20))[0, :, 0, 0]
    assert np.allclose(corner.numpy(), -mean / std, atol=1e-6)


def test_contract(file):
    """The contract kit has nothing to object to: gradients are there, ascent raises the score, and so on."""
    check_reward(HumanPreferenceScore(path=str(file)))


def test_without_antialiasing_too(file):
    """The other resize is differentiable, gives other scores, and says so."""
    plain, bare = HumanPreferenceScore(path=str(file)), HumanPreferenceScore(path=str(file), antialias=False)
    check_reward(bare)
    batch = RewardBatch.from_images(torch.rand(2, 3, 90, 60, generator=torch.Generator().manual_seed(0)), ["a", "b"])
    assert not torch.allclose(plain.score(batch), bare.score(batch), atol=1e-4)
    assert bare.preprocessing == "8 bits, bicubic without antialiasing to 32, pad 32"


def test_provenance_tells_variants_and_resizes_apart(tmp_path, tensors):
    """Variant and resize are stored with every score, set or not."""
    file = save(tmp_path, tensors, "mine.pt")
    found = HumanPreferenceScore(path=str(file)).provenance()
    assert found["options"]["variant"] == "v2.1"
    assert found["options"]["antialias"] is True
    assert found["preprocessing"] == "8 bits, bicubic to 32, pad 32"
    assert found["origin"] == "rdm_reward_hps.reward"
    images = torch.rand(1, 3, 32, 32)
    evaluation = score_images(f'hps:v2[path="{file}",antialias=false]', images, ["a"])
    stored = evaluation.provenance["hps"]
    assert stored["options"]["variant"] == "v2"
    assert stored["origin"] == "rdm-reward-hps 0.1.0"
    assert "without antialiasing" in stored["preprocessing"]


def test_transformers_format(tmp_path):
    """A folder that `CLIPModel` reads is scored like `clip`'s, where padding and cropping agree."""
    folder = save_tiny_clip(tmp_path / "model")
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    wanted = HumanPreferenceScore(path=str(folder))
    model, tokens = CLIPModel.from_pretrained(folder), tiny_tokenizer()(["a", "b", "c"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**tokens, pixel_values=wanted.transform(images))
    cosine = theirs.logits_per_image.diag() / model.logit_scale.exp()
    scores = score_images(f'hps:v2[path="{folder}"]', images, ["a", "b", "c"]).outputs["hps"].scores
    assert torch.allclose(scores, cosine, atol=1e-5)


def test_folder_with_the_file(file):
    """A folder that holds the variant's file is taken for it."""
    images = torch.rand(1, 3, 32, 32)
    by_folder, by_file = (HumanPreferenceScore(path=str(path)) for path in (file.parent, file))
    batch = RewardBatch.from_images(images, ["a"])
    assert torch.equal(by_folder.score(batch), by_file.score(batch))


def test_safetensors_and_half_precision(tmp_path, tensors):
    """A safetensors file of half precision gives nearly the same scores, in weights of any dtype."""
    from safetensors.torch import save_file

    save(tmp_path, {})
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "hps_v2.1.safetensors")
    batch = RewardBatch.from_images(torch.rand(3, 3, 50, 40), ["a", "b", "c"])
    half = HumanPreferenceScore(path=str(tmp_path / "hps_v2.1.safetensors"), dtype="bfloat16")
    full = HumanPreferenceScore(path=str(save(tmp_path, tensors)))
    assert half.encoder.model.visual_projection.weight.dtype == torch.bfloat16
    assert half.encoder.model.logit_scale.dtype == torch.float32
    assert half.score(batch).dtype == torch.float32
    assert torch.allclose(half.score(batch), full.score(batch), atol=0.05)


@pytest.mark.parametrize(
    ("name", "asked", "named"),
    [
        ("HPS_v2_compressed.pt", "v2.1", "v2"),
        ("HPS_v2.1_compressed.pt", "v2", "v2.1"),
        ("HPS_v2.pt", "v2.1", "v2"),
        ("hpsv2_1.pt", "v2", "v2.1"),
        ("HPS-v2.0.pt", "v2.1", "v2"),
    ],
)
def test_the_other_variants_file_is_refused(tmp_path, tensors, name, asked, named):
    """A file that says it is the other variant's is refused, and taken as what it is."""
    file = save(tmp_path, tensors, name)
    with pytest.raises(RewardError, match=rf"is HPS {named} by its name, but hps:{asked} was .*{FILES[asked]}"):
        HumanPreferenceScore(path=str(file), variant=asked)
    HumanPreferenceScore(path=str(file), variant=named)


def test_the_other_variants_folder_is_refused(tmp_path, tensors):
    """So is a folder that holds only the other's file, or names the other; "HPSv2" alone names neither."""
    save(tmp_path / "files", tensors, FILES["v2"])
    with pytest.raises(RewardError, match="is HPS v2 by its name"):
        HumanPreferenceScore(path=str(tmp_path / "files"))
    with pytest.raises(RewardError, match=r"is HPS v2\.1 by its name"):
        HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "HPSv2.1-hf")), variant="v2")
    for variant in FILES:
        HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "HPSv2-hf")), variant=variant)


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "visual.proj"), r"missing: visual_projection\.weight"),
        (lambda t: without(t, "visual.transformer.resblocks.1.attn.in_proj_bias"), "missing: .*q_proj.bias"),
        (lambda t: t | {"visual.head.weight": torch.zeros(3)}, r"holds 'visual\.head\.weight'"),
        (lambda t: t | {"visual.proj": torch.zeros(32, 15)}, r"visual_projection.*\[15, 32\], expected \[16, 32\]"),
        (lambda t: t | {"visual.proj": torch.zeros(32)}, r"'visual\.proj' has shape \[32\], expected two dim"),
        (lambda t: t | {"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(95)}, "three equal parts"),
        (lambda t: t | {"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(())}, "three equal parts"),
        (lambda t: {"state_dict": {"weights": [1, 2]}}, "mapping of names to tensors"),
        (lambda t: {}, "mapping of names to tensors"),
    ],
)
def test_wrong_tensors(tmp_path, tensors, change, message):
    """Another model's tensors are refused, and the message says which."""
    with pytest.raises(RewardError, match=message):
        HumanPreferenceScore(path=str(save(tmp_path, change(tensors))))


class Bomb:
    """Pickled, it appends to a list when it is read by an unpickler that runs code."""

    def __reduce__(self):
        return CODE_RAN.append, (1,)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1972298538\n",
        b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
        b"a",
        b"",
        b"(l.",
        b"PK\x03\x04 cut off",
        pickle.dumps({"state_dict": {"weights": Bomb()}}),
        pickle.dumps(Bomb(), protocol=2),
    ],
    ids=["git-lfs pointer", "html", "letter", "empty", "list", "cut zip", "code", "code alone"],
)
@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"])
def test_not_a_checkpoint(tmp_path, content, name):
    """What is no checkpoint is a clear error, and code in it is not run."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RewardError, match=r"cannot read the weights .*complete download"):
        HumanPreferenceScore(path=str(tmp_path / name))
    assert not CODE_RAN


def test_code_in_a_torch_file_is_not_run(tmp_path):
    """A file that torch.save wrote is not trusted more."""
    torch.save({"state_dict": {"weight": torch.zeros(1), "more": Bomb()}}, tmp_path / "hps.pt")
    with pytest.raises(RewardError, match="objects other than tensors, which could run code"):
        HumanPreferenceScore(path=str(tmp_path / "hps.pt"))
    assert not CODE_RAN


def test_nothing_there(tmp_path):
    """A missing file, and a folder without a checkpoint, are clear errors."""
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(RewardError, match=r"no weights at .*HPS_v2\.1_compressed\.pt"):
            HumanPreferenceScore(path=str(path))


def test_config_beside_the_file(tmp_path, tensors):
    """Another model's config is passed over, a damaged or an impossible one is an error."""
    file = save(tmp_path, tensors)
    architecture = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RewardError, match=r"v2\.1 .*does not fit: missing: .*layers\.10"):
        HumanPreferenceScore(path=str(file))
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(RewardError, match=r"cannot read .*config\.json.*move it away"):
        HumanPreferenceScore(path=str(file))
    architecture["vision_config"]["num_attention_heads"] = 5
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    with pytest.raises(RewardError, match=r"architecture of HPS v2\.1 .* cannot be built"):
        HumanPreferenceScore(path=str(file))


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("the cat\u2019s \u201chat\u201d", 'the cat\'s "hat"'),
        ("\u201eso\u201f \u2018so\u201b \u02bc \u201a", "\"so\" 'so' ' '"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs &lt;3", "cats & dogs <3"),
        ("it&rsquo;s", "it's"),
        ("plain caf\u00e9", "plain caf\u00e9"),
    ],
)
def test_prompts_are_read_as_the_original_reads_them(tmp_path, tensors, prompt, read):
    """Worked out by hand from ftfy's tables and html.unescape, which open_clip calls before its tokenizer."""
    assert cleaned(prompt) == read
    hps = HumanPreferenceScore(path=str(save(tmp_path, tensors)))
    ours, theirs = (
        score_images(hps, torch.rand(1, 3, 40, 32, generator=torch.Generator().manual_seed(0)), [text])
        .outputs["hps"]
        .scores
        for text in (prompt, read)
    )
    assert torch.equal(ours, theirs)


def test_tokenizer(tmp_path, tensors):
    """A tokenizer can be named, and one of another model is refused."""
    file = save(tmp_path / "checkpoint", tensors)
    vocabulary = tiny_tokenizer().get_vocab()
    end = vocabulary.pop("<|endoftext|>")
    more = CLIPTokenizer(vocab=vocabulary | {"ab</w>": end, "<|endoftext|>": end + 1}, merges=[])
    more.save_pretrained(tmp_path / "more")
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    HumanPreferenceScore(path=str(file), tokenizer=str(tmp_path / "same"))
    for path in (file, save_tiny_clip(tmp_path / "model")):
        with pytest.raises(RewardError, match=r"the tokenizer .*more' does not fit its CLIP: it has 191 tokens"):
            HumanPreferenceScore(path=str(path), tokenizer=str(tmp_path / "more"))
    with pytest.raises(RewardError, match=r"the tokenizer .*none' cannot be loaded"):
        HumanPreferenceScore(path=str(file), tokenizer=str(tmp_path / "none"))


def test_from_the_hub(monkeypatch, tmp_path, tensors):
    """Each variant asks for its own file of the authors' repository; other repositories may hold a `CLIPModel`."""
    asked = []

    def download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        if repository != HUB:
            raise LocalEntryNotFoundError("not here")
        return str(save(tmp_path, tensors, filename))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    HumanPreferenceScore()
    HumanPreferenceScore(variant="v2", revision="abc")
    assert asked == [(HUB, FILES["v2.1"], None), (HUB, FILES["v2"], "abc")]

    tiny = HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "tiny"))).encoder
    monkeypatch.setattr("rdm_reward_hps.reward.load_clip", lambda source, *_: asked.append(source) or tiny)
    assert HumanPreferenceScore(path="someone/hps").encoder is tiny
    assert asked[-1] == "someone/hps"
    with pytest.raises(RewardError, match=r"'someone/HPSv2\.1-hf' is HPS v2\.1 by its name"):
        HumanPreferenceScore(path="someone/HPSv2.1-hf", variant="v2")


def test_hub_out_of_reach(monkeypatch):
    """Without the file, the error says which repository and what to do."""

    def download(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RewardError, match=r"'xswu/HPSv2' cannot be loaded: .*no network.* Pass path="):
        HumanPreferenceScore()


def test_unknown_variant():
    """There is no v3 here."""
    with pytest.raises(RewardError, match=r"reward 'hps', option variant: .*'v2' or 'v2\.1'"):
        score_images("hps:v3", torch.rand(1, 3, 32, 32), ["a"])
