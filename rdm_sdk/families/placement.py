"""Where a pipeline's frozen parts wait between uses, so that they do not take memory from the training."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.base import ModelFamily


class Offload:
    """Modules that wait on the CPU, move to a device when they are called, and stay there until `release`.

    Accelerate's hooks do the moving; diffusers' autoencoders call them in `encode` and `decode` too.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.hooks = [cpu_offload_with_hook(module, device)[1] for module in modules]

    def release(self) -> None:
        """Send the modules back to the CPU. No graph through them may be alive: it would find its weights gone."""
        for hook in self.hooks:
            hook.offload()


def drop_text_encoders(family: ModelFamily) -> None:
    """Take the text encoders out of the pipeline and free their memory; prompts cannot be encoded any more."""
    family.pipeline.register_modules(**dict.fromkeys(family.text_encoders()))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def part_vae(family: ModelFamily, slicing: bool, tiling: bool) -> None:
    """Let the VAE work on one image at a time (`slicing`), and on overlapping tiles of large ones (`tiling`).

    Raises:
        ConfigError: it cannot.
    """
    vae = family.pipeline.vae
    for what, wanted in (("slicing", slicing), ("tiling", tiling)):
        try:
            if wanted:
                getattr(vae, f"enable_{what}")()
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(f"vae_{what}=True: {type(vae).__name__} has no {what}; leave it off") from error
