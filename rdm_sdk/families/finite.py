"""What half precision overflows in, named where it happens: later it looks like a student that has diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rdm_sdk.errors import ModelError
from rdm_sdk.types import Condition


def check_encoding(condition: Condition, prompts: Sequence[str | None], encoders: Mapping[str, nn.Module]) -> None:
    """Raise `ModelError` if a prompt's encoding `[N, ...]` is not finite; names the encoders that are to blame."""
    for name, part in condition.items():
        if part.is_floating_point() and not _is_finite(part):
            row = next(row for row, one in enumerate(part) if not _is_finite(one))
            dtypes = ", ".join(f"{encoder} in {_dtype(module)}" for encoder, module in encoders.items())
            raise ModelError(
                f"the encoding of the prompt {prompts[row]!r} holds NaN or infinite values, in {name!r}: a text "
                f"encoder overflows ({dtypes}); load them in bfloat16 or float32"
            )


def check_decoded(images: Tensor, latents: Tensor, vae: Any) -> None:
    """Raise `ModelError` if a VAE makes pixels that are not finite of latents that are."""
    if not _is_finite(images) and _is_finite(latents):
        raise ModelError(
            f"the VAE ({type(vae).__name__} in {_dtype(vae)}) makes NaN or infinite pixels of finite latents: it "
            "overflows; keep it in float32, pipe.vae.to(torch.float32), as the SDK does where it loads the base itself"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; those of tensors without values, by which runs are planned, are."""
    return tensor.is_meta or bool(tensor.isfinite().all())


def _dtype(module: Any) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")
