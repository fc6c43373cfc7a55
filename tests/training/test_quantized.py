"""Quantized bases: adapters train on them, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from digit_runs import same_bits, weights_of_roles
from torch import nn

from rdm_sdk import ConfigError, RDMTrainer, digits
from rdm_sdk.families import load

Make = Callable[..., RDMTrainer]


def quantized_teacher(bits: int) -> Any:
    """Return the embedded teacher with its attention layers in 8 or 4 bits, as a loader on a GPU leaves them."""
    bnb = pytest.importorskip("bitsandbytes")
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    network = pipeline.transformer
    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear) and ".attn." in n]:
        if bits == 4:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.support_avx512bf16_for_cpu = False  # that path is for inference alone
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        network.set_submodule(name, new.to("cpu"))
    setattr(network, f"is_loaded_in_{bits}bit", True)
    return pipeline


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_train_on_a_quantized_base(make_trainer: Make, tmp_path: Path, bits: int) -> None:
    """The base stays as it is, in few bits; the student's adapters move, and are exported as any others."""
    trainer = make_trainer(tmp_path, model=quantized_teacher(bits), learning_rate=1e-3)
    layer = trainer.roles.backbone.transformer_blocks[0].attn.to_q.base_layer
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    base, before = layer.weight.detach().clone(), weights_of_roles(trainer, "student")
    trainer.train()
    assert torch.equal(layer.weight, base)
    assert not same_bits(before, weights_of_roles(trainer, "student"))
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()


def test_quantization_is_asked_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backbone, in the right format, computed in the run's dtype."""
    pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {}

    def from_pretrained(place: str, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError("seen enough")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    for bits, name in (("4bit", "bitsandbytes_4bit"), ("8bit", "bitsandbytes_8bit")):
        with pytest.raises(load.ModelError, match="seen enough"):
            load.load_family(digits.teacher_path(), torch.bfloat16, bits)
        config = asked["quantization_config"]
        assert (config.quant_backend, config.components_to_quantize) == (name, ["transformer"])
        assert config.quant_kwargs[f"load_in_{bits}"] is True
        assert config.quant_kwargs.get("bnb_4bit_compute_dtype", torch.bfloat16) == torch.bfloat16


def test_quantization_that_cannot_work_is_refused(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU or the library, of a base that is loaded already, or with a copy to train in full."""
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantization='4bit' needs a CUDA device"):
            make_trainer(tmp_path, quantization="4bit")
    with pytest.raises(ConfigError, match="acts when the base is loaded, and model is a StableDiffusion3Pipeline"):
        make_trainer(tmp_path, model=DiffusionPipeline.from_pretrained(digits.teacher_path()), quantization="8bit")
    with pytest.raises(ConfigError, match="few bits, which cannot be trained in full"):
        make_trainer(tmp_path, quantization="8bit", student_weights="full")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes: pip install"):
        load.load_family(digits.teacher_path(), torch.bfloat16, "4bit")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_base_is_loaded_in_few_bits_and_trained_on(make_trainer: Make, tmp_path: Path, quantization: str) -> None:
    """From its path, by the setting alone."""
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, quantization=quantization, bf16=True, use_cpu=False, learning_rate=1e-3)
    assert trainer.roles.backbone.transformer_blocks[0].attn.to_q.base_layer.weight.dtype in (torch.uint8, torch.int8)
    before = weights_of_roles(trainer, "student")
    trainer.train()
    assert not same_bits(before, weights_of_roles(trainer, "student"))
