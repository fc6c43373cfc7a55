"""Encodings without their padding: what a network makes of them is the same bits, and they are far smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from pipeline_calls import size_of
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.encodings import full_lengths, padded, rows_without_padding
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT
from rdm_sdk.types import Condition

MASKED = ("PixArtSigmaPipeline", "QwenImagePipeline", "SanaPipeline", "ZImagePipeline")
TEXTS = ["a red fox", None, "a dog in the snow"]


def kept(family: ModelFamily, condition: Condition) -> tuple[list[Condition], Condition]:
    """Return the rows of a condition as they are kept, and the condition that comes of them again."""
    rows = rows_without_padding(condition, family.masks)
    return rows, padded(rows, full_lengths(condition, family.masks), torch.device("cpu"))


def learned(family: ModelFamily, condition: Condition) -> list[Tensor]:
    """Return what the student predicts, and its gradients with respect to the state and to its weights."""
    shape = len(TEXTS), *family.latent_shape(**size_of(family))
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x_0 = family.denoiser(family.roles, STUDENT, condition)(x_t, torch.tensor([0.9, 0.5, 0.2]))
    weights = list(family.roles.parameters_of(STUDENT).values())
    gradients = torch.autograd.grad(x_0.square().sum(), [x_t, *weights], allow_unused=True)
    return [x_0, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("kind", MASKED)
def test_padding_that_is_hidden_changes_no_bit(kind: str) -> None:
    """Predictions and every gradient, also where what stood in hidden places was not zero; and rows are short."""
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    family.add_roles({STUDENT: LoraConfig(r=2, init_lora_weights=False)})
    condition = family.condition(TEXTS)
    rows, again = kept(family, condition)
    assert again.keys() == condition.keys()
    for name, tensor in condition.items():
        assert (again[name].shape, again[name].dtype) == (tensor.shape, tensor.dtype)
    one, other = learned(family, condition), learned(family, again)
    assert len(one) == len(other) > 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    names = dict(family.masks)
    assert all(len(row[name]) == len(row[mask]) < 60 for row in rows for name, mask in names.items())
    assert all(len(condition[name][0]) >= 300 for name in names)


def test_families_without_a_mask_keep_everything(pipelines: dict[str, Any]) -> None:
    """Their networks look at padding; every row comes back as it was."""
    for kind in sorted(TINY_PIPELINES.keys() - set(MASKED)):
        family = load_family(pipelines[kind], torch.float32)
        assert family.masks == ()
        condition = family.condition(["a red fox", None])
        _, again = kept(family, condition)
        assert all(torch.equal(again[name], tensor) for name, tensor in condition.items())


def test_a_text_that_is_hidden_whole_is_kept_whole() -> None:
    """Attention to nothing but hidden places is spread over what stands there."""
    condition = {"text": torch.randn(2, 5, 3), "mask": torch.tensor([[0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])}
    masks = (("text", "mask"),)
    rows = rows_without_padding(condition, masks)
    assert [len(row["text"]) for row in rows] == [5, 3]
    again = padded(rows, full_lengths(condition, masks), torch.device("cpu"))
    assert torch.equal(again["text"][0], condition["text"][0])
    assert torch.equal(again["text"][1, :3], condition["text"][1, :3])
    assert torch.equal(again["mask"], condition["mask"])
    assert not again["text"][1, 3:].any()


def test_a_row_holds_no_memory_of_others() -> None:
    """One that is let go of gives its memory back."""
    rows = rows_without_padding({"text": torch.randn(3, 5, 2), "pooled": torch.randn(3, 4)}, ())
    tensors = [tensor for row in rows for tensor in row.values()]
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [tensor.nbytes for tensor in tensors]
