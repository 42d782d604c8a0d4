"""Grouped matrix multiplication: the backends, and the choice among them.

    y[rows of group e] = x[rows of group e] @ weight[e]

`offs[e]` is where group e ends. Rows past `offs[-1]` belong to no group: what they hold in the result, and in the
gradient of x, is undefined, and callers mask them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import chosen

__all__ = [
    "Gather",
    "alignment",
    "backend_for",
    "device_backend",
    "fits_torch",
    "grouped_mm",
    "multiply",
    "sizes_fit_torch",
]

_ALIGNMENT_BYTES = 16
# Public, and promised for more than bfloat16, from torch 2.10 on.
_public_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
_torch_grouped_mm: Any = _public_grouped_mm or getattr(torch, "_grouped_mm", None)
_TORCH_DTYPES = (torch.bfloat16, torch.float16, torch.float32) if _public_grouped_mm else (torch.bfloat16,)


def alignment(dtype: torch.dtype) -> int:
    """Elements a row must be a multiple of, so that the torch backend accepts its stride."""
    return max(1, _ALIGNMENT_BYTES // dtype.itemsize)


def device_backend(device: torch.device) -> str:
    """`"torch"` where `torch.nn.functional.grouped_mm` serves the device, else `"loop"`."""
    if _torch_grouped_mm is None or chosen() == "loop":
        return "loop"
    return "torch" if _serves(device) else "loop"


@cache  # a product of few rows would wait for what torch asks of the device
def _serves(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"


def backend_for(*operands: Tensor) -> str:
    """The backend for operands of one dtype: `"torch"`, or `"loop"`, a product per expert.

    The torch operator takes bfloat16, from torch 2.10 on float16 and float32 too, with strides that are multiples of 16
    bytes and, before torch 2.11, data that starts at such a multiple (a memory-mapped weight may not).
    """
    return device_backend(operands[0].device) if fits_torch(*operands) else "loop"


def fits_torch(*operands: Tensor) -> bool:
    """Whether operands are such as the torch backend takes, wherever they are."""
    return sizes_fit_torch(*operands) and all(t.data_ptr() % _ALIGNMENT_BYTES == 0 for t in operands)


def sizes_fit_torch(*operands: Tensor) -> bool:
    """Whether operands have a dtype and sizes that the torch backend takes."""
    dtype = operands[0].dtype
    unit = alignment(dtype)
    for shape in [operand.shape for operand in operands]:
        if shape[-1] % unit or (len(shape) != 2 and shape[-2] % unit):
            return False
    return dtype in _TORCH_DTYPES


def _with_unit_stride(matrix: Tensor) -> Tensor:
    """The stack with one of its last two axes contiguous and the other a whole row apart, as the operator wants it."""
    rows, columns = matrix.stride()[-2:]
    if (columns == 1 and rows == matrix.shape[-1]) or (rows == 1 and columns == matrix.shape[-2]):
        return matrix
    return matrix.contiguous()


def multiply(x: Tensor, weight: Tensor, offs: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:
    """x "S in", or "T in" with `order`; weight "E in out" -> "S out"."""
    x = x if order is None else x[order // k]
    if backend_for(x, weight) == "torch":
        result: Tensor = _torch_grouped_mm(x.contiguous(), _with_unit_stride(weight), offs=offs)
        return result
    y = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        torch.mm(x[start:end], weight[expert], out=y[start:end])
        start = end
    return y


def _gradient(dy: Tensor, weight: Tensor, offs: Tensor, order: Tensor | None, k: int) -> Tensor:
    """dy "S out", weight "E in out" -> the gradient of x, "S in", or "T in" with `order`."""
    rows = multiply(dy, weight.transpose(1, 2), offs)
    if order is None:
        return rows
    places = torch.arange(order.shape[0], device=order.device)
    back = torch.empty_like(order)
    back[order] = places
    return rows.where((places < offs[-1]).unsqueeze(1), 0.0)[back].view(-1, k, rows.shape[1]).sum(1)


def _weight_gradient(x: Tensor, dy: Tensor, offs: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:
    """x as for `multiply`, dy "S out" -> "E in out", x[rows of e].T @ dy[rows of e]; zero for experts without rows."""
    x, E = x if order is None else x[order // k], offs.shape[0]
    if backend_for(x, dy) == "torch":
        result: Tensor = _torch_grouped_mm(x.contiguous().t(), dy.contiguous(), offs=offs)
        return result
    grad = x.new_zeros(E, x.shape[1], dy.shape[1])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            torch.mm(x[start:end].t(), dy[start:end], out=grad[expert])
        start = end
    return grad


# Under torch.compile all three are opaque operators: inductor then neither reorders the strides they ask for nor
# applies the bfloat16-only rule of torch's own fake kernel. The gather is inside of them: outside, the partitioner of
# AOT autograd keeps the gathered rows, k times the hidden states, from forward to backward. An autograd function that
# gathers again does not help, the two are merged.
_multiply_op = torch.library.custom_op("peft_moe_compat::grouped_mm", multiply, mutates_args=())
_gradient_op = torch.library.custom_op("peft_moe_compat::grouped_mm_gradient", _gradient, mutates_args=())
_weight_gradient_op = torch.library.custom_op(
    "peft_moe_compat::grouped_mm_weight_gradient", _weight_gradient, mutates_args=()
)


@_multiply_op.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:  # noqa: ARG001
    return x.new_empty((x if order is None else order).shape[0], weight.shape[2])


@_gradient_op.register_fake
def _(dy: Tensor, weight: Tensor, offs: Tensor, order: Tensor | None, k: int) -> Tensor:  # noqa: ARG001
    return dy.new_empty(dy.shape[0] // k, weight.shape[1])


@_weight_gradient_op.register_fake
def _(x: Tensor, dy: Tensor, offs: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:  # noqa: ARG001
    return x.new_empty(offs.shape[0], x.shape[1], dy.shape[1])


class Gather(NamedTuple):
    """Which token each routed row comes from.

    Attributes:
        order: "S", the place in the flat "(T k)" of the row at each sorted place; a permutation.
        k: Rows of a token, one behind the other before they were sorted.
    """

    order: Tensor
    k: int


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, order: Tensor | None, k: int) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # A frozen weight needs no x, and a constant x no weight: neither is then kept alive.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offs, order)
        ctx.k = k
        return (_multiply_op if torch.compiler.is_compiling() else multiply)(x, weight, offs, order, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, offs, order = ctx.saved_tensors
        inner, outer = _gradient, _weight_gradient
        if torch.compiler.is_compiling():
            inner, outer = _gradient_op, _weight_gradient_op
        dx = None if weight is None else inner(dy, weight, offs, order, ctx.k)
        dw = None if x is None else outer(x, dy, offs, order, ctx.k)
        return dx, dw, None, None, None


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, gather: Gather | None = None) -> Tensor:
    """Multiplies each group of rows with its own matrix; differentiable once, in `x` and `weight`.

    Args:
        x: "S in", rows sorted by group; cast to the dtype of `weight`, since the product is not autocast-enabled.
        weight: "E in out", any strides.
        offs: "E", int32, where each group ends.
        gather: For compiled graphs: x is then "T in", and its gathered rows are neither kept for the backward nor, past
            `offs[-1]`, part of its gradient.

    Returns:
        "S out" in the dtype of `weight`. No host synchronisation on the torch backend.
    """
    out: Tensor = _GroupedMM.apply(x.to(weight.dtype), weight, offs, *(gather or (None, 1)))  # type: ignore[no-untyped-call]
    return out
