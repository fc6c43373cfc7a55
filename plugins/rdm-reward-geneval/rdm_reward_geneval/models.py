"""Who looks: OWLv2, which finds objects by name, and CLIP, which tells their colors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from rdm_reward_geneval.rules import COLORS, Box
from rdm_sdk import RewardError
from rdm_sdk.vision import ClipEncoder, ImageTransform, expanded, load_pretrained, unavailable

QUERY = "a photo of a {}"
"""What OWLv2 is asked for: the form of words that it was evaluated with."""
COLOR_TEXTS = ("a photo of a {color} {kind}", "a photo of a {color}-colored {kind}", "a photo of a {color} object")
"""GenEval's own, of which it takes the mean embedding."""


class Detector(nn.Module):
    """OWLv2 with its tokenizer and image processor."""

    def __init__(self, source: str, revision: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Any = load_pretrained(Owlv2ForObjectDetection, source, "OWLv2", revision, dtype)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(expanded(source), revision=revision)
        except Exception as error:
            raise unavailable(source, error, "tokenizer") from error
        words = self.model.config.text_config.vocab_size
        if self.tokenizer.eos_token_id != words - 1:  # OWLv2 reads a text where the highest of its ids stands
            raise RewardError(
                f"the tokenizer of {source!r} does not fit its OWLv2: it ends texts with "
                f"{self.tokenizer.eos_token_id}, the model with {words - 1}; are its files beside the weights?"
            )
        size = self.model.config.vision_config.image_size
        self.processor: Any = Owlv2ImageProcessorPil(size={"height": size, "width": size})

    @torch.no_grad()
    def find(self, images: Tensor, kinds: Sequence[str]) -> list[dict[str, list[Box]]]:
        """Return per image what was found of each kind, for RGB images `[N, 3, H, W]` in [0, 1].

        A place counts as what it looks most like, with the probability of that.
        """
        height, width = images.shape[-2:]
        pixels = self.processor(images=to_pil(images), return_tensors="pt").pixel_values
        queries = [QUERY.format(kind) for kind in kinds]
        length = self.model.config.text_config.max_position_embeddings
        texts = self.tokenizer(queries, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        device = self.model.device
        output = self.model(
            input_ids=texts.input_ids.repeat(len(images), 1).to(device),
            attention_mask=texts.attention_mask.repeat(len(images), 1).to(device),
            pixel_values=pixels.to(device, self.model.dtype),
        )
        best = output.logits.float().max(dim=-1)
        x, y, w, h = (output.pred_boxes.float() * max(height, width)).unbind(-1)  # of the square that it is padded to
        corners = (x - w / 2).clamp(0, width), (y - h / 2).clamp(0, height), (x + w / 2).clamp(0, width)
        boxes = torch.stack([*corners, (y + h / 2).clamp(0, height), best.values.sigmoid()], dim=-1).tolist()
        found = []
        for places, labels in zip(boxes, best.indices.tolist(), strict=True):
            of: dict[str, list[Box]] = {kind: [] for kind in kinds}
            for place, label in zip(places, labels, strict=True):
                of[kinds[label]].append(Box(*place))
            found.append(of)
        return found


@torch.no_grad()
def colors_of(clip: ClipEncoder, image: Tensor, kind: str, boxes: Sequence[Box]) -> list[str]:
    """Return the colors of objects of a kind in an image `[3, H, W]`: what CLIP finds their boxes to be most like."""
    texts = [text.format(color=color, kind=kind) for color in COLORS for text in COLOR_TEXTS]
    classes = F.normalize(clip.embed_prompts(texts).unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
    transform = ImageTransform(clip.image_size)
    crops = torch.cat([transform(cropped(image, box)[None]) for box in boxes])
    best = (clip.embed_images(crops.to(clip.model.device)) @ classes.T).argmax(-1)
    return [COLORS[index] for index in best.tolist()]


def cropped(image: Tensor, box: Box) -> Tensor:
    """Return the part of an image `[3, H, W]` in a box, rounded to whole pixels, one at least."""
    height, width = image.shape[-2:]
    left, top = min(round(box.left), width - 1), min(round(box.top), height - 1)
    right, bottom = max(round(box.right), left + 1), max(round(box.bottom), top + 1)
    return image[:, top:bottom, left:right]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Round RGB images `[N, 3, H, W]` in [0, 1] to 8 bits."""
    levels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in levels]
