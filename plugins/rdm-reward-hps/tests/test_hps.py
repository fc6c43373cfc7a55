"""HPS on tiny random CLIPs with open_clip's names, and on the names and shapes of the true one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hps_files import save, shapes_of
from PIL import Image
from rdm_reward_hps.reward import HumanPreferenceScore
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from rdm_sdk import RewardBatch, score_images
from rdm_sdk.testing import check_reward, save_tiny_clip, tiny_tokenizer
from rdm_sdk.vision import CLIP_VIT_H, convert_open_clip

PROMPTS = ["a", "bc d", "a d", "a prompt that is far too long for sixteen tokens"]


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
