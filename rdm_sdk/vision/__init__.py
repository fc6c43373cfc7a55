"""Tools for rewards that look at pictures: preprocessing that equals PIL's, checked weights, CLIP."""

from rdm_sdk.vision.clip import ClipEncoder, ClipReward, convert_open_clip, load_clip
from rdm_sdk.vision.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ImageTransform, resize
from rdm_sdk.vision.weights import PretrainedConfig, find_file, load_checked, read_tensors

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClipEncoder",
    "ClipReward",
    "ImageTransform",
    "PretrainedConfig",
    "convert_open_clip",
    "find_file",
    "load_checked",
    "load_clip",
    "read_tensors",
    "resize",
]
