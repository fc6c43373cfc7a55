"""The aesthetic predictors: heads of the true names and widths on a tiny random CLIP or SigLIP."""

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from rdm_reward_aesthetic.reward import FILES, MIRROR, MIRRORED_FILE, AestheticScore
from torch.nn import functional as F
from transformers import CLIPModel, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from rdm_sdk import RewardBatch, RewardError, score_images
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing import check_reward, save_tiny_clip
from rdm_sdk.vision import ImageTransform

CODE_RAN = []
PLACES = {
    "v1": [],
    "v2": [f"layers.{i}" for i in (0, 2, 4, 6, 7)],
    "v2.5": [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)],
}


def head_of(variant, width=16):
    """Random tensors with the names of a variant's checkpoint, for embeddings of some width."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1024, width), (128, 1024), (64, 128), (16, 64), (1, 16)]
    shapes = {"weight": (1, width), "bias": (1,)}
    if variant != "v1":
        shapes = {
            f"{place}.{kind}": size[: 2 - (kind == "bias")]
            for place, size in zip(PLACES[variant], sizes, strict=True)
            for kind in shapes
        }
    return {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP on disk."""
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny SigLIP on disk, with its text tower, as the hub has it."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("siglip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = tower | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
        vision = tower | {"image_size": 56, "patch_size": 14}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        for parameter in model.parameters():  # as small as they start, all images would be alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A folder with all heads."""
    folder = tmp_path_factory.mktemp("heads")
    for variant, name in FILES.items():
        torch.save(head_of(variant), folder / name)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_score(clip, heads, images, variant):
    """The score is the head, as a chain of matrix products, on the unit embedding that transformers gives."""
    spec = f'aesthetic:{variant}[path="{heads / FILES[variant]}",clip_path="{clip}"]'
    ours = score_images(spec, images).outputs["aesthetic"].scores
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip)
        x = F.normalize(model.get_image_features(pixel_values=ImageTransform(32)(images)).pooler_output, dim=-1)
    tensors = head_of(variant)
    for prefix in [f"{place}." for place in PLACES[variant]] or [""]:
        x = x @ tensors[f"{prefix}weight"].T + tensors[f"{prefix}bias"]
    assert torch.allclose(ours, x[:, 0], atol=1e-5)
    assert ours.std() > 1e-3


def test_score_of_siglip(siglip, heads, images):
    """v2.5 reads what SigLIP's image processor and vision tower of transformers give."""
    ours = score_images(f'aesthetic:v2.5[path="{heads}",clip_path="{siglip}"]', images).outputs["aesthetic"].scores
    prepare = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    whole = [Image.fromarray((i * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for i in images]
    with torch.no_grad():
        pooled = SiglipModel.from_pretrained(siglip).vision_model(**prepare(whole, return_tensors="pt")).pooler_output
    x, tensors = pooled / pooled.norm(dim=-1, keepdim=True), head_of("v2.5")
    for place in PLACES["v2.5"]:
        x = x @ tensors[f"{place}.weight"].T + tensors[f"{place}.bias"]
    assert torch.allclose(ours, x[:, 0], atol=2e-3)  # PIL rounds a level otherwise here and there
    assert ours.std() > 0.02


def test_backbone_is_shared(clip, heads):
    """`clip` and `aesthetic` of one CLIP hold the same model; another dtype is another model."""
    heads = str(heads)
    found = resolve_rewards(f'clip[path="{clip}"] + aesthetic[path="{heads}",clip_path="{clip}"]')
    assert found[0].reward.encoder is found[1].reward.encoder
    half = AestheticScore(path=heads, clip_path=clip, dtype="bfloat16")
    assert half.encoder is not found[1].reward.encoder
    assert half.encoder.model.visual_projection.weight.dtype == torch.bfloat16


def test_half_precision(clip, heads, images):
    """In half precision the scores are nearly the same, and float32."""
    batch = RewardBatch.from_images(images)
    full, half = (
        AestheticScore(path=str(heads), clip_path=clip, dtype=d).score(batch) for d in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.05)


@pytest.mark.parametrize("variant", ["v1", "v2", "v2.5"])
def test_contract(clip, siglip, heads, variant):
    """The contract kit has nothing to object to: gradients are there, ascent raises the score, and so on."""
    encoder = siglip if variant == "v2.5" else clip
    check_reward(AestheticScore(variant=variant, path=str(heads), clip_path=encoder))


def test_provenance(clip, heads):
    """Variant, CLIP and resize are stored with every score, set or not."""
    found = AestheticScore(path=str(heads), clip_path=clip, antialias=False).provenance()
    assert found["options"]["variant"] == "v2"
    assert found["options"]["clip_path"] == clip
    assert found["preprocessing"] == "8 bits, bicubic without antialiasing to 32, crop 32"


def test_provenance_of_siglip(siglip, heads):
    """v2.5 stretches images to SigLIP's size."""
    found = AestheticScore(variant="v2.5", path=str(heads), clip_path=siglip, dtype="bfloat16")
    assert found.provenance()["preprocessing"] == "8 bits, bicubic to 56, stretch 56"
    assert found.encoder.model.dtype == torch.bfloat16
    assert found.head.scoring_head[0].weight.dtype == torch.float32


def test_the_default_head_is_on_the_hub(monkeypatch, clip, heads):
    """v2 comes from TRL's copy."""
    asked = []

    def download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        return str(heads / FILES["v2"])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    AestheticScore(clip_path=clip, revision="abc")
    assert asked == [(MIRROR, MIRRORED_FILE, "abc")]


def test_missing_heads(monkeypatch, clip, tmp_path):
    """Without a head, the error says which file to download from where and how to pass it."""

    def download(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RewardError, match=r"no network.*download sac\+logos.*christophschuhmann/improved-.*\[path="):
        AestheticScore(clip_path=clip)
    with pytest.raises(RewardError, match=r"needs .*download sa_0_4_vit_l_14_linear\.pth from .*LAION-AI/.*v1\[path="):
        AestheticScore(variant="v1", clip_path=clip)
    with pytest.raises(RewardError, match=r"download aesthetic_predictor_v2_5\.pth from .*discus0434/.*v2\.5\[path="):
        AestheticScore(variant="v2.5")
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(RewardError, match=r"no weights at .*download sac\+logos"):
            AestheticScore(path=str(path), clip_path=clip)


@pytest.mark.parametrize(
    ("variant", "tensors", "message"),
    [
        ("v2", head_of("v1"), r"the head of v1, .*ask for aesthetic:v1.*sac\+logos"),
        ("v1", head_of("v2"), r"the head of v2, .*ask for aesthetic:v2.*sa_0_4_vit_l_14_linear\.pth"),
        ("v2", head_of("v2.5"), r"the head of v2\.5, .*ask for aesthetic:v2\.5"),
        ("v2.5", head_of("v2"), r"the head of v2, .*ask for aesthetic:v2, .*aesthetic_predictor_v2_5\.pth"),
        ("v2.5", head_of("v2.5", 768), r"embeddings of width 768, and the SigLIP gives 16; .*siglip-so400m"),
        ("v2", head_of("v2", 768), r"embeddings of width 768, and the CLIP gives 16; .*clip_path= "),
        ("v1", head_of("v1", 768), r"embeddings of width 768, and the CLIP gives 16; .*clip_path= "),
        ("v2", {n: t for n, t in head_of("v2").items() if n != "layers.4.bias"}, r"missing: layers\.4\.bias"),
        ("v1", {"weight": torch.zeros(1, 16)}, "missing: bias"),
        ("v2", head_of("v2") | {"layers.9.weight": torch.zeros(1, 1)}, r"not expected: layers\.9\.weight"),
        ("v2", head_of("v2") | {"layers.2.weight": torch.zeros(64, 1024)}, r"\[64, 1024\], expected \[128, 1024\]"),
        ("v1", {"weight": torch.zeros(16), "bias": torch.zeros(1)}, r"\[16\], expected \[1, 16\]"),
        ("v2", {"encoder.weight": torch.zeros(3)}, "missing: .*not expected: encoder"),
    ],
)
def test_wrong_heads(clip, siglip, tmp_path, variant, tensors, message):
    """The other variant's head, another CLIP's, and what is no head are told apart."""
    torch.save(tensors, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=message):
        AestheticScore(
            variant=variant, path=str(tmp_path / "head.pth"), clip_path=siglip if variant == "v2.5" else clip
        )


class Bomb:
    """Pickled, it appends to a list when it is read by an unpickler that runs code."""

    def __reduce__(self):
        return CODE_RAN.append, (1,)


def test_not_a_checkpoint(clip, tmp_path):
    """GitHub's page instead of the file, and a file with code, are clear errors; the code is not run."""
    page, code = tmp_path / "page.pth", tmp_path / "code.pth"
    page.write_text("\n\n<!DOCTYPE html>\n<html><body>improved-aesthetic-predictor</body></html>")
    torch.save(Bomb(), code)
    for path in (page, code):
        with pytest.raises(RewardError, match=r"cannot read the weights .*complete download"):
            AestheticScore(path=str(path), clip_path=clip)
    assert not CODE_RAN


def test_no_clip_there(heads, tmp_path):
    """A folder without a CLIP is a clear error that names it."""
    with pytest.raises(RewardError, match=f"{tmp_path.name}.* cannot be loaded"):
        AestheticScore(path=str(heads), clip_path=str(tmp_path))
