"""lora_B as PEFT packs it, "d (r E)" with the experts fastest, against one contiguous piece per expert."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .common import Factor, cdiv
from .launch import kernel

__all__ = ["packed", "unpacked", "wants_packing"]


@kernel()
def _copy(
    source, result, r, D, num_experts, scaling,
    from_e, from_r, from_d, to_e, to_r, to_d, Q: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """result = scaling * source, both "E r d" of any strides; read and written along whichever axis is contiguous."""
    q = tl.program_id(0) * Q + tl.arange(0, Q)
    e = (tl.program_id(1) * E + tl.arange(0, E))[None, :].to(tl.int64)
    in_r, in_d = (q % r)[:, None].to(tl.int64), (q // r)[:, None].to(tl.int64)
    mask = (q[:, None] < r * D) & (e < num_experts)
    tile = tl.load(source + e * from_e + in_r * from_r + in_d * from_d, mask=mask, other=0.0).to(tl.float32) * scaling
    tl.store(result + e * to_e + in_r * to_r + in_d * to_d, tile.to(result.dtype.element_ty), mask=mask)


def _copied(source: Tensor, result: Tensor, scaling: float) -> Tensor:
    E, r, D = source.shape
    _copy(
        (cdiv(r * D, 64), cdiv(E, 64), 1),
        source,
        result,
        r,
        D,
        E,
        scaling,
        *source.stride(),
        *result.stride(),
        Q=64,
        E=64,
        num_warps=4,
    )
    return result


def wants_packing(factor: Factor, rows: int) -> bool:
    """Whether neighbouring experts lie side by side, so that each element read for one costs a whole sector, and enough
    rows are routed to make up for a copy."""
    E = factor.tensor.shape[0]
    return factor.tensor.stride(0) == 1 and 4 <= E <= rows


def packed(factor: Factor | None, dtype: torch.dtype, rows: int) -> Factor | None:
    """The factor with its experts apart, scaled and rounded, where that pays; else as it is."""
    if factor is None or not wants_packing(factor, rows):
        return factor
    E, r, D = factor.tensor.shape
    apart = factor.tensor.new_empty(E, D, r, dtype=dtype).transpose(1, 2)
    return Factor(_copied(factor.tensor, apart, factor.scaling))


def unpacked(apart: Tensor, like: Tensor) -> Tensor:
    """A gradient "E r d" in the strides of the factor it belongs to, so that autograd takes it without a copy."""
    return _copied(apart, torch.empty_like(like), 1.0)
