"""Harmless warnings of other libraries are silenced by their names, and no others."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from rdm_sdk.quiet import HARMLESS, silence_harmless_warnings

PREFIX = "No LoRA keys associated to CLIPTextModel found with the prefix="


@pytest.mark.parametrize(
    ("logger", "message", "passes"),
    [
        ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision (not installed); and so", False),
        ("transformers.utils.import_utils", "`Qwen2VLImageProcessor` requires torchvision (not installed)", True),
        ("diffusers.loaders.lora_base", f"{PREFIX}'text_encoder_2'. This is safe", False),
        ("diffusers.loaders.lora_base", f"{PREFIX}'transformer'. This is safe", True),
        ("diffusers.loaders.lora_base", "something else", True),
        (
            "bitsandbytes.backends.cpu.ops",
            "Failed to load CPU gemm_4bit_forward from kernels-community: No module",
            False,
        ),
        ("bitsandbytes.backends.cpu.ops", "Failed to load the library", True),
    ],
)
def test_only_what_is_named_is_silenced(logger: str, message: str, passes: bool) -> None:
    """A student without weights for the backbone, or another class without torchvision, is still told."""
    silence_harmless_warnings()  # a second time
    record = logging.LogRecord(logger, logging.WARNING, __file__, 1, message, None, None)
    assert bool(logging.getLogger(logger).filter(record)) is passes
    assert [type(f).__name__ for f in logging.getLogger(logger).filters].count("_Silence") == 1


def test_a_start_says_nothing_of_the_kind() -> None:
    """In a fresh process, where the libraries are imported for the first time; what they do tell gets no further."""
    code = (
        "import logging, rdm_sdk\nfrom rdm_sdk.quiet import HARMLESS\n"
        "for name in HARMLESS:\n"
        "    logging.getLogger(name).filters.insert(0, lambda record: print(record.getMessage()) or True)\n"
        "from diffusers import StableDiffusion3Pipeline"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "requires torchvision" in done.stdout
    assert done.stderr == ""
    assert HARMLESS
