"""Tools for rewards that look at pictures: preprocessing that equals PIL's, checked weights, CLIP, references."""

from rdm_sdk.vision.clip import (
    CLIP_VIT_H,
    ClipEncoder,
    ClipReward,
    clip_from_open_clip,
    convert_open_clip,
    load_clip,
)
from rdm_sdk.vision.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ImageTransform, resize
from rdm_sdk.vision.references import PictureColumn
from rdm_sdk.vision.weights import (
    PretrainedConfig,
    expanded,
    find_file,
    load_checked,
    load_pretrained,
    read_tensors,
    unavailable,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "CLIP_VIT_H",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClipEncoder",
    "ClipReward",
    "ImageTransform",
    "PictureColumn",
    "PretrainedConfig",
    "clip_from_open_clip",
    "convert_open_clip",
    "expanded",
    "find_file",
    "load_checked",
    "load_clip",
    "load_pretrained",
    "read_tensors",
    "resize",
    "unavailable",
]
