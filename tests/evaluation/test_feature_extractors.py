"""Feature extractors: a function, DINOv2 and InceptionV3, their images prepared as the published figures' were."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rdm_sdk import ConfigError, DataError
from rdm_sdk.evaluation import inception
from rdm_sdk.evaluation.features import feature_extractor
from rdm_sdk.evaluation.inception import inception_pixels
from rdm_sdk.testing import example_images
from rdm_sdk.vision import IMAGENET_MEAN, IMAGENET_STD

SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


class TinyLayers(nn.Module):
    """Stands for the network's layers: six features, as `[N, 6, 1, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, stride=60)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).relu().mean((2, 3), keepdim=True)


class TinyInception(nn.Module):
    """The interface of inception-2015-12-05.pt; its forward resizes in its way, which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = TinyLayers()

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        raise RuntimeError("images are resized outside")


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, TinyInception]:
    """Return the file of a tiny network that passes for InceptionV3, and the network."""
    torch.manual_seed(0)
    tiny, file = TinyInception(), tmp_path / "published" / "inception-2015-12-05.pt"
    file.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of TorchScript
        torch.jit.script(tiny).save(file)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(inception, "ADDRESS", file.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return file, tiny


def pictures(count: int, height: int, width: int) -> tuple[Tensor, list[np.ndarray]]:
    """Return 8-bit pictures, as images `[N, 3, H, W]` in [0, 1] and as PIL takes them, `[H, W, 3]`."""
    bits = (example_images(count, height, width) * 255).round().to(torch.uint8)
    return bits.float() / 255, list(bits.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("size", [(512, 512), (300, 420), (32, 32), (299, 299)], ids=str)
def test_images_of_inception_are_those_of_clean_fid(size: tuple[int, int]) -> None:
    """Each channel in floats through PIL's bicubic filter, unrounded, then to [-1, 1]: within 0.001 of 255."""
    images, bits = pictures(2, *size)
    expected = []
    for picture in bits:
        channels = [Image.fromarray(picture[..., c].astype(np.float32)) for c in range(3)]
        resized = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
        expected.append((torch.from_numpy(np.stack(resized)) - 128) / 128)
    found = inception_pixels(images)
    assert found.shape == (2, 3, 299, 299)
    assert (found - torch.stack(expected)).abs().max() < 0.001 / 128


def test_inception_is_its_layers_from_a_path(network: tuple[Path, TinyInception]) -> None:
    """The features are the layers' of images resized here, and what made them is in the extractor's name."""
    file, tiny = network
    images = example_images(3, 64, 48)
    extractor = feature_extractor(str(file))
    with torch.no_grad():
        expected = tiny.layers(inception_pixels(images)).flatten(1).double()
    assert expected.abs().max() > 0.01
    assert torch.allclose(extractor(images), expected, atol=1e-6)
    assert extractor.name.startswith("inception-2015-12-05 (sha256 ")
    assert "bicubic to 299" in extractor.name


def test_inception_is_downloaded_once_and_checked(
    network: tuple[Path, TinyInception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into torch's folder of weights; without a network, the error names the address and the way round."""
    file, _ = network
    first = feature_extractor("inception")
    kept = tmp_path / "torch" / "hub" / "checkpoints" / file.name
    assert kept.read_bytes() == file.read_bytes()
    file.unlink()
    assert feature_extractor("inception").name == first.name
    kept.unlink()
    with pytest.raises(ConfigError, match=r"cannot be downloaded from file://.*give its path as the features"):
        feature_extractor("inception")
    file.write_bytes(b"an error page")
    with pytest.raises(ConfigError, match=r"cannot be downloaded.*invalid hash value"):
        feature_extractor("inception")
    assert not kept.exists()


def test_another_network_is_no_inception(network: tuple[Path, TinyInception]) -> None:
    """Its figures would look as published ones do; and TorchScript is code."""
    file, _ = network
    with pytest.raises(ConfigError, match=r"there is no file 'nowhere\.pt'; give the path of inception-2015"):
        feature_extractor("nowhere.pt")
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="is not the InceptionV3 of published FIDs: its sha256 is"):
        feature_extractor(str(file))


def test_dinov2_is_prepared_as_fd_dinov2(tmp_path: Path) -> None:
    """Both sides to 224 by PIL's bicubic filter, ImageNet's mean and deviation, the [CLS] embedding."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    images, bits = pictures(2, 300, 420)
    resized = [Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC) for p in bits]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in resized])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0].double()
    extractor = feature_extractor(str(tmp_path))
    assert (extractor(images) - expected).abs().max() < 1e-3 * expected.std()
    assert extractor.name == f"{tmp_path} [CLS], 8 bits, bicubic to 224, stretch 224"
    assert torch.equal(extractor((images * 255).round().to(torch.uint8)), extractor(images))


def test_what_is_no_extractor_is_refused(tmp_path: Path) -> None:
    """Models of other kinds, and functions that return no features of every image."""
    images = torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    for wrong, message in (
        (lambda x: x, "float matrix"),
        (lambda x: x[:1].flatten(1), "1 rows of features for 5 images"),
        (lambda x: x.flatten(1) / 0, "NaN or infinity"),
    ):
        with pytest.raises(DataError, match=message):
            feature_extractor(wrong)(images)
    ViTModel(ViTConfig(**SIZES, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a model of type 'vit'; give 'dinov2', 'inception'"):
        feature_extractor(str(tmp_path))
