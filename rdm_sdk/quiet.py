"""Warnings of other libraries that are known to be harmless here, each silenced by its name and nothing beside it."""

from __future__ import annotations

import logging
import re

HARMLESS = {
    # diffusers imports these two classes with its pipelines, which use them for image prompts alone.
    "transformers.utils.import_utils": r"`(Siglip|CLIP)ImageProcessor` requires torchvision \(not installed\)",
    # A student adapts the backbone, and its file holds nothing for the text encoders.
    "diffusers.loaders.lora_base": r"No LoRA keys associated to \w+ found with the prefix='text_encoder",
    # At every import on CPUs with bfloat16 in AVX512: the kernel is for inference in 4 bits, and has a substitute.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community",
}
"""The logger that says it, and how it begins."""


class _Silence(logging.Filter):
    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = re.compile(message)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.message.match(record.getMessage())


def silence_harmless_warnings() -> None:
    """Add the filters, which stay for as long as the process lives; a second call changes nothing."""
    for name, message in HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(there, _Silence) for there in logger.filters):
            logger.addFilter(_Silence(message))
