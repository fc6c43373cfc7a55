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
    ],
)
def test_only_what_is_named_is_silenced(logger: str, message: str, passes: bool) -> None:
    """A student without weights for the backbone, or another class without torchvision, is still told."""
    silence_harmless_warnings()  # a second time
    record = logging.LogRecord(logger, logging.WARNING, __file__, 1, message, None, None)
    assert bool(logging.getLogger(logger).filter(record)) is passes
    assert [type(f).__name__ for f in logging.getLogger(logger).filters].count("_Silence") == 1


def test_a_start_says_nothing_of_the_kind() -> None:
    """In a fresh process, where the libraries are imported for the first time; without the filters they do."""
    code = "import rdm_sdk{}; from diffusers import StableDiffusion3Pipeline"
    off = ".quiet as quiet, logging; [logging.getLogger(n).filters.clear() for n in quiet.HARMLESS]"
    loud, quiet = (
        subprocess.run([sys.executable, "-c", code.format(more)], capture_output=True, text=True, check=True).stderr
        for more in (off, "")
    )
    assert "requires torchvision" in loud
    assert quiet == ""
    assert HARMLESS
