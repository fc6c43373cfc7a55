"""How much memory a computation takes, found out without doing it: on tensors of the meta device.

They have shapes and dtypes and no values, so that a network of any size runs on them in a second and takes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, for as long as they live.

    Views count nothing, and what was there before, such as parameters, counts nothing either. Tensors that autograd
    saves and gradients are tensors like others. It works on any device, and sees everything but a kernel's own scratch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes that are alive now."""
        self.peak = 0
        """The most that were alive at once, in bytes."""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look_at((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._look_at(result, made=True)
        return result

    def _look_at(self, tensors: Any, made: bool) -> None:
        for tensor in _tensors_in(tensors):
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place not in self._known:
                size = storage.nbytes() if made else 0
                self._known[place] = weakref.ref(storage, partial(self._let_go, place, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _let_go(self, place: int, size: int, _: object) -> None:
        del self._known[place]
        self.live -= size


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an operator's arguments or results; PyTorch's own trees take most of a rehearsal's time."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors_in(one)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


class LikeCuda(TorchFunctionMode):
    """Lets tensors of the meta device be treated as those on a CUDA device would be, while it is active.

    - Attention is one fused kernel (flash or memory-efficient), which keeps queries, keys, values, its output and a
      float32 per query and head for the backward pass. On the meta device PyTorch would take the plain form, which
      keeps the matrices of attention weights; so would a GPU where no fused kernel fits.
    - Autocast casts what it casts on CUDA: matrix products and convolutions to `autocast`, sums, powers, softmaxes and
      normalizations to float32. PyTorch's own autocast leaves meta tensors alone.

    Args:
        autocast: the dtype of matrix products; None is no autocast.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self._casts: dict[int, Tensor] | None = None
        """Cast parameters by id, None where they are not kept."""

    @contextmanager
    def one_forward(self) -> Iterator[None]:
        """Cast each parameter once within the block, and keep its cast up to the block's end, as autocast does."""
        self._casts = {}
        try:
            yield
        finally:
            self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.autocast is not None and name in LOWER:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        elif self.autocast is not None and name in FLOAT32:
            args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (self.autocast, torch.float64):
            return tensor
        if self._casts is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.autocast)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(self.autocast)
        return self._casts[id(tensor)]


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


LOWER = frozenset(
    (
        *("__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d"),
        *("conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum"),
        *("linear", "matmul", "mm", "multi_dot", "mv", "prelu", "scaled_dot_product_attention", "vecdot"),
    )
)
"""Names of functions that CUDA's autocast computes in the lower dtype."""
FLOAT32 = frozenset(
    (
        *("__pow__", "__rpow__", "acos", "arccos", "arcsin", "asin", "cdist", "cosh", "cosine_similarity", "cumprod"),
        *("cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "huber_loss", "interpolate", "kl_div", "l1_loss"),
        *("layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "matrix_norm", "mse_loss", "norm"),
        *("pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "softmax", "softplus"),
        *("sum", "tan", "vector_norm"),
    )
)
"""Names of functions that CUDA's autocast computes in float32."""
_has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
if _has_kernel is None or _has_kernel("aten::rms_norm", "AutocastCUDA"):  # PyTorch 2.11 has none
    FLOAT32 |= {"rms_norm"}


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Take the place of `scaled_dot_product_attention` (`[N, heads, tokens, width]`).

    The CPU's fused kernel keeps what CUDA's do: the output lies as the queries do, so that merging the heads afterwards
    copies nothing, and a float32 per query and head is left for the backward pass.
    """
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = fused(query, key, value, attn_mask=attn_mask)[0]
    return output


def bytes_of_all(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors take, each counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def bytes_of(*modules: nn.Module) -> int:
    """Return how many bytes the parameters and buffers of modules take, each counted once."""
    return bytes_of_all(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


def count_of(*modules: nn.Module) -> int:
    """Return how many parameters modules have, each counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
