"""What reward plugins stand on: preprocessing that equals PIL's, checked weights, shared backbones."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rdm_sdk import RewardError
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.testing import example_images, save_tiny_clip
from rdm_sdk.vision import CLIP_MEAN, CLIP_STD, ImageTransform, find_file, load_checked, load_clip, read_tensors, resize
from rdm_sdk.vision.preprocess import to_8_bits

SIZES = [(512, 512), (300, 400), (400, 300), (37, 53), (64, 64), (768, 1024), (224, 224), (200, 600)]


def photograph(height: int, width: int) -> np.ndarray:
    """Return an 8-bit picture `[H, W, 3]` with smooth areas and grain."""
    return (example_images(1, height, width)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def as_tensor(picture: np.ndarray) -> Tensor:
    """Return a picture as images `[1, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_equals_pil(size: tuple[int, int]) -> None:
    """The mean difference from PIL is below 0.01 of 255, upwards and downwards."""
    picture = photograph(*size)
    shorter = min(size)
    for side in (224, 48):
        target = (side * size[0] // shorter, side * size[1] // shorter)
        expected = np.asarray(Image.fromarray(picture).resize(target[::-1], Image.Resampling.BICUBIC)).astype(float)
        found = resize(as_tensor(picture), target)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - expected).mean() < 0.01
        assert np.abs(found - expected).max() <= 2


def test_tall_images_are_resized_width_first() -> None:
    """Width first is what Pillow did to every image before version 13, and so what the models were trained on.

    Pillow 13 begins with the height of images more than about twice as tall as wide.
    """
    picture = photograph(900, 200)
    width_first = Image.fromarray(picture).resize((100, 900), Image.Resampling.BICUBIC)
    expected = np.asarray(width_first.resize((100, 224), Image.Resampling.BICUBIC)).astype(float)
    found = resize(as_tensor(picture), (224, 100))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).mean() < 0.01


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] <= 2 * size[1]], ids=str)
def test_clip_preprocessing_equals_transformers(size: tuple[int, int]) -> None:
    """Resize, crop and normalization are those of `CLIPImageProcessor`."""
    picture = photograph(*size)
    expected = CLIPImageProcessorPil()(Image.fromarray(picture), return_tensors="pt").pixel_values
    found = ImageTransform(224)(as_tensor(picture))
    assert (found - expected).abs().mean() < 0.01 / 255 / min(CLIP_STD)


@pytest.mark.parametrize(
    ("size", "floor", "nearest"),
    [
        ((832, 1216), (0, 51), (0, 52)),  # 224 x 327: 51.5, which torchvision rounds to even
        ((1216, 832), (51, 0), (52, 0)),
        ((224, 325), (0, 50), (0, 50)),  # 50.5 becomes 50
        ((224, 226), (0, 1), (0, 1)),
        ((224, 224), (0, 0), (0, 0)),
    ],
)
def test_the_middle_is_where_the_original_has_it(
    size: tuple[int, int], floor: tuple[int, int], nearest: tuple[int, int]
) -> None:
    """By hand: torchvision's `CenterCrop` begins at `int(round((length - crop) / 2))`, transformers' at half, down."""
    picture = as_tensor(photograph(*size))
    shorter = min(size)
    fitted = resize(to_8_bits(picture), (224 * size[0] // shorter, 224 * size[1] // shorter))
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    for middle, (top, left) in (("floor", floor), ("round", nearest)):
        found = ImageTransform(224, middle=middle)(picture)
        assert torch.equal(found, (fitted[..., top : top + 224, left : left + 224] - mean) / std)
        assert top == (round if middle == "round" else int)((fitted.shape[-2] - 224) / 2)


@pytest.mark.parametrize("size", [(300, 400), (401, 300), (40, 100), (224, 221)], ids=str)
def test_padding_equals_pil(size: tuple[int, int]) -> None:
    """The longer side fits, the picture is in the middle, and the rest is black before normalization."""
    picture = photograph(*size)
    scale = 224 / max(size)
    fitted = Image.fromarray(picture).resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(fitted, ((224 - fitted.width) // 2, (224 - fitted.height) // 2))
    expected = (as_tensor(np.asarray(canvas)) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    found = ImageTransform(224, fit="pad")(as_tensor(picture))
    assert (found - expected).abs().mean() < 0.01 / 255 / min(CLIP_STD)


def test_every_pixel_gets_a_gradient() -> None:
    """Rounding passes gradients; without antialiasing, most pixels of a large image would get none."""

    def share_with_gradient(antialias: bool) -> float:
        images = example_images(1, 400, 400).requires_grad_()
        ImageTransform(100, antialias=antialias)(images).square().sum().backward()
        assert images.grad is not None
        return float((images.grad != 0).float().mean())

    assert share_with_gradient(True) > 0.99
    assert share_with_gradient(False) <= 1.0
    images = example_images(1, 800, 800).requires_grad_()
    ImageTransform(100, antialias=False)(images).square().sum().backward()
    assert images.grad is not None
    assert float((images.grad != 0).float().mean()) < 0.5


def test_black_and_white_get_a_gradient_and_what_is_beyond_gets_none() -> None:
    """Pixels at the ends of the range can still come back from there."""
    pixels = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], requires_grad=True)
    (gradient,) = torch.autograd.grad(to_8_bits(pixels).sum(), pixels)
    assert gradient.tolist() == [0, 1, 1, 1, 0]


def test_the_gradient_is_that_of_the_unrounded_resize() -> None:
    """It agrees with finite differences of the same resize without rounding."""
    images = example_images(1, 40, 40).double().requires_grad_()
    weights = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    (gradient,) = torch.autograd.grad((resize(images, (16, 16)) * weights).sum(), images)
    smooth = torch.nn.functional.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
    (expected,) = torch.autograd.grad((smooth * weights).sum(), images)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_a_student_is_judged_as_its_saved_images_would_be() -> None:
    """Images are rounded to 8 bits before anything else."""
    images = example_images(1, 50, 60)
    saved = (images * 255 + 0.5).floor() / 255
    assert not torch.equal(images, saved)
    assert torch.equal(ImageTransform(32)(images), ImageTransform(32)(saved))


def test_the_transform_has_a_name() -> None:
    """What is kept with the scores tells resizes apart."""
    names = {
        str(ImageTransform(224, **kwargs)) for kwargs in ({}, {"antialias": False}, {"fit": "pad"}, {"resize_to": 256})
    }
    assert len(names) == 4


# ---- Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_tensors_are_read(tmp_path: Path, suffix: str) -> None:
    """Safetensors and torch files, the latter with or without `state_dict`."""
    tensors = {"weight": torch.ones(2, 3)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if suffix == ".pt" else tensors, path)
    assert torch.equal(read_tensors(path)["weight"], tensors["weight"])


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


def test_unusable_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong kinds, damage, code and missing files are each said clearly; no code is run."""
    (tmp_path / "page.pt").write_text("<html>401 Unauthorized</html>")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    (tmp_path / "weights.onnx").write_bytes(b"something else")
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    for name, words in {
        "page.pt": "cannot read the weights .*page.pt.*complete download",
        "cut.safetensors": "cannot read the weights .*cut.safetensors",
        "weights.onnx": r"is no weights file: expected .safetensors, .pt, .pth or .bin",
        "evil.pt": "objects other than tensors, which could run code",
        "list.pt": "does not hold a mapping of names to tensors; got list",
        "gone.pt": "there are no weights at .*gone.pt",
    }.items():
        with pytest.raises(RewardError, match=words):
            read_tensors(tmp_path / name)
    assert "code was run" not in capsys.readouterr().out


def test_a_checkpoint_must_fit(tmp_path: Path) -> None:
    """Missing and surplus names and wrong shapes are named; the module is left as it was."""
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    right = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    for wrong, words in (
        ({"weight": right["weight"]}, "'?missing: bias"),
        (right | {"extra": torch.ones(1)}, "not expected: extra"),
        ({"wieght": right["weight"], "bias": right["bias"]}, r"Did you mean 'wieght'\?"),
        (right | {"weight": torch.ones(3, 2)}, r"'weight' has shape \[3, 2\], expected \[2, 3\]"),
    ):
        with pytest.raises(RewardError, match=words):
            load_checked(module, wrong, "a test")
        assert torch.equal(module.weight, before)
    load_checked(module, right, "a test")
    assert torch.equal(module.weight, torch.ones(2, 3))


def test_files_are_found(tmp_path: Path) -> None:
    """A file is taken as it is, a folder by the file's name; a hub that cannot be reached says what to do."""
    (tmp_path / "a.pt").write_bytes(b"")
    assert find_file(str(tmp_path / "a.pt"), "b.pt") == tmp_path / "a.pt"
    assert find_file(str(tmp_path), "a.pt") == tmp_path / "a.pt"
    with pytest.raises(RewardError, match=r"neither the file itself nor 'b\.pt' inside it"):
        find_file(str(tmp_path), "b.pt")
    with pytest.raises(RewardError, match=r"'nobody/nothing' cannot be loaded.*Pass path="):
        find_file("nobody/nothing", "b.pt")


# ---- Backbones --------------------------------------------------------------------------------------------------


def test_a_backbone_is_loaded_once_and_let_go(tmp_path: Path) -> None:
    """The same CLIP is shared as long as somebody uses it, and freed afterwards; another dtype is another CLIP."""
    folder = save_tiny_clip(tmp_path)
    first, second = load_clip(str(folder)), load_clip(f"{folder}/../{folder.name}")
    assert first is second
    assert load_clip(str(folder), dtype=torch.bfloat16) is not first
    address = id(first)
    del first, second
    gc.collect()
    from rdm_sdk.vision.clip import _SHARED

    assert address not in {id(encoder) for encoder in _SHARED.values()}


def test_clip_and_aesthetic_share_one_clip(tmp_path: Path) -> None:
    """Asked for together, they hold the same encoder."""
    folder = save_tiny_clip(tmp_path / "clip")
    save_file({"weight": torch.ones(1, 16), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    spec = f'clip[path="{folder}"] + aesthetic:v1[path="{tmp_path / "head.safetensors"}",clip_path="{folder}"]'
    clip, aesthetic = (own.reward for own in resolve_rewards(spec))
    assert clip.encoder is aesthetic.encoder


def test_a_clip_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them up with random numbers."""
    from safetensors.torch import load_file

    folder = save_tiny_clip(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"visual_projection\.weight"):
        load_clip(str(folder))


def test_the_prompt_cache_may_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch gets all of its prompts, also where they push each other out of the cache."""
    monkeypatch.setattr("rdm_sdk.vision.clip._MAX_CACHED_PROMPTS", 2)
    clip = load_clip(str(save_tiny_clip(tmp_path)))
    clip.embed_prompts(["a"])
    clip.embed_prompts(["b"])
    assert clip.embed_prompts(["a", "c", "d"]).shape == (3, 16)
    assert len(clip._prompts) == 2


def test_prompts_do_not_depend_on_their_neighbors(tmp_path: Path) -> None:
    """An embedding is the same to the last bit alone and in company, from the cache and anew."""
    folder = str(save_tiny_clip(tmp_path))
    together = load_clip(folder).embed_prompts(["a", "a long prompt", "a"])
    assert torch.equal(together[0], together[2])
    assert torch.equal(load_clip(folder).embed_prompts(["a long prompt"])[0], together[1])
