"""The meter, and meta tensors that are treated as CUDA treats its own."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor, nn
from torch.nn import functional as F
from usual_families import USUAL

from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.planning import footprint
from rdm_sdk.planning.blueprint import blueprint
from rdm_sdk.planning.footprint import FLOAT32, LOWER, LikeCuda, Meter, bytes_of, count_of
from rdm_sdk.planning.rehearsal import Rehearsal


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_meter_counts_what_lives(device: str) -> None:
    """New storages count for as long as they live; views, parameters and what was there before count nothing."""
    before, layer = torch.zeros(10, device=device), nn.Linear(10, 10, device=device)
    with Meter() as meter:
        one = before + 1  # 40 bytes
        view = one[2:5].reshape(3, 1)
        assert (meter.live, meter.peak) == (40, 40)
        del one
        assert meter.live == 40  # the view keeps it
        del view
        assert meter.live == 0
        before.add_(1)
        other = layer.weight.t()
        assert meter.live == 0
        layer(before).sum().backward()
        assert meter.live == 440  # gradients of weight and bias
    assert meter.peak > 440
    assert other.shape == (10, 10)


def test_the_meter_sees_what_autograd_saves() -> None:
    """A graph keeps the tensors that its backward pass needs: here exp's output, but not the sum's input."""
    x = torch.zeros(10, requires_grad=True)
    with Meter() as meter:
        y = x.exp().sum()
        assert meter.live == 44
        del y
        assert meter.live == 0


def test_attention_keeps_no_matrix() -> None:
    """Queries, keys, values, output and a float32 per query and head, as fused kernels do; on the CPU as well."""
    kept = {}
    for device in ("cpu", "meta"):
        tokens = [torch.zeros(2, 50, 3, 8, device=device, requires_grad=True) for _ in range(3)]
        with LikeCuda() if device == "meta" else nullcontext(), Meter() as meter:
            output = F.scaled_dot_product_attention(*(own.transpose(1, 2) for own in tokens))
            kept[device] = meter.live
            merged = output.transpose(1, 2).reshape(2, 50, 24)
            assert meter.live == kept[device]  # merging the heads copies nothing
            torch.autograd.backward(merged.sum())
        assert all(own.grad is not None and own.grad.shape == own.shape for own in tokens)
    assert kept["meta"] == kept["cpu"] == 4 * 2 * 50 * 3 * (8 + 1)


def test_autocast_names_are_those_that_cuda_casts() -> None:
    """Every operator with a kernel for CUDA's autocast is in one of the lists, or is none that a backbone calls."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    cast = {name[6:].split(".")[0] for name in operators if has(name, "AutocastCUDA")}
    aliases = {"arccos": "acos", "arcsin": "asin", "__matmul__": "matmul", "__rmatmul__": "matmul"}
    aliases |= {"__pow__": "pow", "__rpow__": "pow", "interpolate": "upsample_nearest2d", "vecdot": "linalg_vecdot"}
    aliases |= {"multi_dot": "linalg_multi_dot", "vector_norm": "linalg_vector_norm"}
    aliases |= {"matrix_norm": "linalg_matrix_norm"}
    ours = {aliases.get(name, name) for name in LOWER | FLOAT32}
    assert ours <= cast
    # Kernels below those, losses and recurrent cells, and what only takes the widest of its dtypes.
    below = r"_.*|(cudnn_)?convolution.*|upsample_.*|native_.*|.*_cell|.*_loss\d?d?|pdist|binary_.*|\w+_norm"
    widest = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot"
    assert {name for name in cast - ours if not re.fullmatch(below, name)} <= set(widest.split())
    assert not LOWER & FLOAT32


class Block(nn.Module):
    """A bit of everything that autocast treats differently, on `[N, 8]`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8, device=device, dtype=torch.bfloat16).requires_grad_(False)
        self.trained = nn.Linear(8, 8, device=device)
        self.norm = nn.LayerNorm(8, device=device)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.trained(self.frozen(x)) @ self.trained.weight  # the same parameter twice: cast once
        return self.norm(F.silu(hidden).float())


def test_casts_are_made_and_kept_as_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's list of float32 functions, which has none of these, all bytes are those of the CPU's autocast."""
    monkeypatch.setattr(footprint, "FLOAT32", frozenset())
    found = {}
    for device in ("cpu", "meta"):
        block, x = Block(device), torch.zeros(4, 8, device=device)
        mode: Any = LikeCuda(torch.bfloat16)
        with mode if device == "meta" else nullcontext(), Meter() as meter:
            with mode.one_forward() if device == "meta" else torch.autocast("cpu", torch.bfloat16):
                y = block(x)
                during = meter.live
            kept = meter.live
            torch.autograd.backward(y.float().sum())
            found[device] = during, kept, meter.peak, y.dtype
    assert found["meta"] == found["cpu"]


def test_float32_functions_under_autocast() -> None:
    """Norms, softmaxes and powers come out in float32, as on CUDA, and matrix products in the lower dtype."""
    x = torch.zeros(4, 8, device="meta", dtype=torch.bfloat16)
    y = torch.zeros(4, 8, device="meta")
    with LikeCuda(torch.bfloat16):
        assert F.layer_norm(x, (8,)).dtype == F.softmax(x, -1).dtype == (x**2).dtype == torch.float32
        assert (y @ y.T).dtype == torch.einsum("ij,kj->ik", y, y).dtype == torch.bfloat16
        assert F.silu(x).dtype == torch.bfloat16
        assert F.linear(y.double(), y.double()).dtype == torch.float64
    with LikeCuda():
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16
        assert (y @ y.T).dtype == torch.float32


def test_counting_modules() -> None:
    """Shared parameters and buffers count once."""
    layer = nn.BatchNorm1d(4)
    both = nn.Sequential(layer, layer)
    assert count_of(both, layer) == 8
    assert bytes_of(both, layer) == 4 * (4 * 4) + 8  # weight, bias, mean, variance, and the count of batches


# ---- The passes of the nine families ----------------------------------------------------------------------------


by_family = pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))


@by_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blueprint_is_as_large_as_what_is_loaded(kind: str, dtype: torch.dtype, folders: Path) -> None:
    """Every part has the bytes and parameters of the loaded one, and no tensor has values."""
    planned, loaded = blueprint(folders / kind, dtype), load_family(folders / kind, dtype)
    parts = {planned.component: planned.backbone, **planned.frozen_parts()}
    assert {*parts} == {loaded.component, *loaded.frozen_parts()}
    for name, part in parts.items():
        real = getattr(loaded.pipeline, name)
        assert (name, bytes_of(part), count_of(part)) == (name, bytes_of(real), count_of(real))
        assert {tensor.device.type for tensor in (*part.parameters(), *part.buffers())} == {"meta"}


@by_family
def test_example_encodings_are_like_real_ones(kind: str, folders: Path) -> None:
    """Names, shapes and dtypes are those of encoded prompts; masks are real, so that they can be counted."""
    planned, loaded = (make(folders / kind, torch.bfloat16) for make in (blueprint, load_family))
    real, example = loaded.encode_prompts(["a red fox", "two boats"]), planned.example_encoding(2)
    described = [{name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} for own in (real, example)]
    assert described[0] == described[1]
    masks = [tensor for name, tensor in example.items() if "mask" in name]
    assert all(bool(mask.all()) for mask in masks)


def prepared(family: ModelFamily, targets: list[str] | None = None) -> tuple[Rehearsal, int]:
    """Return a family's rehearsal, roles added, and a count of samples."""
    lora = LoraConfig(r=4, target_modules=targets)
    with torch.device(family.device):
        family.add_roles({"student": lora, "fake": lora})
    unit = family.size_unit
    height = -(-32 // unit) * unit
    return Rehearsal(family, family.latent_shape(height, 2 * height)), 3


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in (*USUAL, "QwenImagePipeline") else pytest.mark.slow)
        for kind in sorted(TINY_PIPELINES)
    ],
)
def test_passes_take_what_they_take_for_real(kind: str, folders: Path) -> None:
    """Forward, backward, with blocks run again, guided, decoding: the bytes on the meta device are those on the CPU."""
    planned, count = prepared(blueprint(folders / kind, torch.float32))
    real, _ = prepared(load_family(folders / kind, torch.float32))
    real._mode = _Nothing()  # CPU attention is fused by itself
    for rehearsal in (planned, real):
        assert rehearsal.train("student", count, False).peak > rehearsal.train("student", count, True).peak
    assert planned.train("student", count, False) == real.train("student", count, False)
    if kind == "QwenImagePipeline":
        # Its forward pass takes a large detour: where few layers have adapters, the peaks are told apart.
        few = ["to_q", "to_k", "to_v", "to_out.0"]
        tape = prepared(blueprint(folders / kind, torch.float32), few)[0].train("student", count, False)
        assert tape.kept < tape.backward < 0.8 * tape.forward
    again, real_again = (own.train("student", count, True) for own in (planned, real))
    assert (again.kept, again.forward) == (real_again.kept, real_again.forward)
    # PixArt's attention has masks, and the CPU's kernel scratch for them.
    assert again.backward == pytest.approx(real_again.backward, rel=0.05 if kind == "PixArtSigmaPipeline" else 0, abs=0)
    # A second pass finds the tables of positions that the first has made.
    once, accumulated = (planned.train("student", count, False, accumulates=more) for more in (False, True))
    assert accumulated.kept == pytest.approx(once.kept, rel=0.01)
    # It makes no gradients beside those that are there; Z-Image's peak comes before the first of them.
    assert accumulated.backward < once.backward or (kind == "ZImagePipeline" and accumulated.backward == once.backward)
    assert planned.predict(TEACHER, count) == real.predict(TEACHER, count)
    assert planned.predict_pair(count) == real.predict_pair(count)
    for guided in (False, True):
        carried, real_carried = (own.carry_back(count, False, guided) for own in (planned, real))
        assert (carried.kept, carried.forward) == (real_carried.kept, real_carried.forward)
        assert carried.backward == pytest.approx(real_carried.backward, rel=0.05)
    assert planned.decode(count, False, False) == real.decode(count, False, False)
    graded, real_graded = (own.differentiate(count, False, False) for own in (planned, real))
    # Sana's VAE multiplies matrices whose layout its CPU convolutions choose.
    tolerance = 0.05 if kind == "SanaPipeline" else 0
    assert graded.kept == pytest.approx(real_graded.kept, rel=tolerance, abs=0)
    assert graded.backward == pytest.approx(real_graded.backward, rel=tolerance, abs=0)


class _Nothing(LikeCuda):
    """A mode that leaves everything as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _OnCpu(_Nothing):
    """A mode whose forward passes run under the CPU's autocast."""

    def one_forward(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "kind",
    ["StableDiffusion3Pipeline", "FluxPipeline", pytest.param("StableDiffusionXLPipeline", marks=pytest.mark.slow)],
)
def test_bfloat16_passes_under_autocast(kind: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 base with float32 adapters: all bytes are those of the CPU's autocast, whose list is shorter."""
    monkeypatch.setattr(footprint, "FLOAT32", frozenset())
    planned, count = prepared(blueprint(folders / kind, torch.bfloat16))
    real, _ = prepared(load_family(folders / kind, torch.bfloat16))
    planned._mode, real._mode = LikeCuda(torch.bfloat16), _OnCpu()
    ours, theirs = (own.train("student", count, False) for own in (planned, real))
    assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
    assert ours.peak == pytest.approx(theirs.peak, rel=0.01)
    assert ours.kept < 0.9 * prepared(blueprint(folders / kind, torch.float32))[0].train("student", count, False).kept


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "FluxPipeline", "SanaPipeline"])
def test_what_is_kept_is_what_autograd_saves(kind: str, folders: Path) -> None:
    """Counted another way, by hooks on saved tensors of the real model: unique storages that are no parameters."""
    planned, count = prepared(blueprint(folders / kind, torch.float32))
    real, _ = prepared(load_family(folders / kind, torch.float32))
    family = real.family
    known = {t.untyped_storage()._cdata for t in (*family.backbone.parameters(), *family.backbone.buffers())}
    condition, x_t, sigma = real._inputs(count)
    known |= {t.untyped_storage()._cdata for t in (x_t, sigma, *condition.values())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_0 = family.denoiser(family.roles, "student", condition)(x_t, sigma)
    output = x_0.untyped_storage()
    saved.setdefault(output._cdata, output.nbytes())
    assert planned.train("student", count, False).kept == pytest.approx(sum(saved.values()), rel=0.02)
