"""The network of published FIDs: the InceptionV3 that TensorFlow released in December 2015, 2,048 features.

Its layers are not those of torchvision's InceptionV3, so what is used is NVIDIA's translation of it into one
TorchScript file, which StyleGAN, EDM and clean-fid use too. Any other file is refused: figures of another network
compare with no published FID, and TorchScript is code.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rdm_sdk.errors import ConfigError, described
from rdm_sdk.files import sha256_of
from rdm_sdk.vision.preprocess import to_8_bits

ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""SHA-256 of the file at that address, as k-diffusion and others pin it; 95,607,719 bytes."""
SIDE = 299


class Inception:
    """Images to the features that FID is defined by, resized as by clean-fid.

    Args:
        path: the file; None takes it from torch's folder of weights (`TORCH_HOME`), and downloads it there before.
        device: where it works.

    Raises:
        ConfigError: there is no such file, it is another one, or it cannot be downloaded.
    """

    def __init__(self, path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        file = _downloaded() if path is None else Path(path).expanduser()
        _check(file)
        self.device = device
        with warnings.catch_warnings():
            # torch advises to export anew, which what was published in this format does not allow.
            warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated", category=DeprecationWarning)
            self.network: Any = torch.jit.load(file, map_location=device).eval()

    def __str__(self) -> str:
        """What figures are kept with."""
        return f"inception-2015-12-05 (sha256 {SHA256[:12]}), 8 bits, bicubic to {SIDE} x {SIDE} unrounded as clean-fid"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features `[N, 2048]`, before the classifier, of images `[N, 3, H, W]` in [0, 1]."""
        # Past the network's forward, which resizes by itself, and without a low-pass filter.
        features: Tensor = self.network.layers(inception_pixels(images.to(self.device)))
        return features.flatten(1)


def inception_pixels(images: Tensor) -> Tensor:
    """Return what the network takes, `[N, 3, 299, 299]` in about [-1, 1], of images `[N, 3, H, W]` in [0, 1].

    8-bit values, resized with a low-pass filter and neither rounded nor cut off afterwards, then (v - 128) / 128
    (clean-fid: Parmar et al. 2022, arXiv 2104.11222).
    """
    images = to_8_bits(images.float())
    if images.shape[-2:] != (SIDE, SIDE):
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (255 * images - 128) / 128


def _downloaded() -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(ADDRESS).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(ADDRESS, str(file), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:  # no network, no such address; another file
            raise ConfigError(
                f"InceptionV3 cannot be downloaded from {ADDRESS}: {described(error)}. Fetch that file elsewhere and "
                "give its path as the features"
            ) from error
    return file


def _check(file: Path) -> None:
    if not file.is_file():
        raise ConfigError(f"there is no file {str(file)!r}; give the path of inception-2015-12-05.pt ({ADDRESS})")
    found = sha256_of(file)
    if found != SHA256:
        raise ConfigError(
            f"{str(file)!r} is not the InceptionV3 of published FIDs: its sha256 is {found}, not {SHA256}. Fetch "
            f"{ADDRESS} again, or in Python pass another network as a function of images"
        )
