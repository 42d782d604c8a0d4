"""Grouped matrix multiplication: the backends, and the choice among them.

    y[rows of group e] = x[rows of group e] @ weight[e]

`offs[e]` is where group e ends. Rows past `offs[-1]` belong to no group: what they hold in the result, and in the
gradient of x, is undefined, and callers mask them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import chosen

__all__ = ["alignment", "backend_for", "device_backend", "grouped_mm"]

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
    if device.type == "cuda":
        return "torch" if torch.cuda.get_device_capability(device) >= (8, 0) else "loop"
    return "torch" if device.type == "cpu" else "loop"


def backend_for(*operands: Tensor) -> str:
    """The backend for operands of one dtype: `"torch"`, or `"loop"`, a product per expert.

    The torch operator takes bfloat16, from torch 2.10 on float16 and float32 too, with strides that are multiples of 16
    bytes and, before torch 2.11, data that starts at such a multiple (a memory-mapped weight may not).
    """
    first = operands[0]
    unit = alignment(first.dtype)
    fits = first.dtype in _TORCH_DTYPES and all(
        t.shape[-1] % unit == 0 and (t.ndim == 2 or t.shape[-2] % unit == 0) and t.data_ptr() % _ALIGNMENT_BYTES == 0
        for t in operands
    )
    return device_backend(first.device) if fits else "loop"


def _with_unit_stride(matrix: Tensor) -> Tensor:
    """The stack with one of its last two axes contiguous and the other a whole row apart, as the operator wants it."""
    rows, columns = matrix.stride()[-2:]
    if (columns == 1 and rows == matrix.shape[-1]) or (rows == 1 and columns == matrix.shape[-2]):
        return matrix
    return matrix.contiguous()


def _multiply(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """x "S in", weight "E in out" -> "S out"."""
    if backend_for(x, weight) == "torch":
        result: Tensor = _torch_grouped_mm(x.contiguous(), _with_unit_stride(weight), offs=offs)
        return result
    y = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        torch.mm(x[start:end], weight[expert], out=y[start:end])
        start = end
    return y


def _weight_gradient(x: Tensor, dy: Tensor, offs: Tensor) -> Tensor:
    """x "S in", dy "S out" -> "E in out", x[rows of e].T @ dy[rows of e]; zero for experts without rows."""
    E = offs.shape[0]
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


# Under torch.compile both products are opaque operators: inductor then neither reorders the strides they ask for nor
# applies the bfloat16-only rule of torch's own fake kernel.
@torch.library.custom_op("peft_moe_compat::grouped_mm", mutates_args=())
def _multiply_op(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return _multiply(x, weight, offs)


@_multiply_op.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:  # noqa: ARG001 (the schema's name)
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("peft_moe_compat::grouped_mm_weight_gradient", mutates_args=())
def _weight_gradient_op(x: Tensor, dy: Tensor, offs: Tensor) -> Tensor:
    return _weight_gradient(x, dy, offs)


@_weight_gradient_op.register_fake
def _(x: Tensor, dy: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], x.shape[1], dy.shape[1])


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # A frozen weight needs no x, and a constant x no weight: neither is then kept alive.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offs)
        return (_multiply_op if torch.compiler.is_compiling() else _multiply)(x, weight, offs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offs = ctx.saved_tensors
        dy, compiling = grads[0], torch.compiler.is_compiling()
        dx = dw = None
        if weight is not None:
            dx = (_multiply_op if compiling else _multiply)(dy, weight.transpose(1, 2), offs)
        if x is not None:
            dw = (_weight_gradient_op if compiling else _weight_gradient)(x, dy, offs)
        return dx, dw, None


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Multiplies each group of rows with its own matrix; differentiable in `x` and `weight`.

    Args:
        x: "S in", rows sorted by group; cast to the dtype of `weight`, since the product is not autocast-enabled.
        weight: "E in out", any strides.
        offs: "E", int32, where each group ends.

    Returns:
        "S out" in the dtype of `weight`. No host synchronisation on the torch backend.
    """
    out: Tensor = _GroupedMM.apply(x.to(weight.dtype), weight, offs)  # type: ignore[no-untyped-call]
    return out
