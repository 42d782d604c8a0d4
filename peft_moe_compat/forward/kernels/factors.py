"""lora_B as PEFT packs it, "d (r E)" with the experts fastest, against one contiguous piece per expert."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...model.packed import PackedWeight
from .common import Factor, cdiv
from .launch import kernel

__all__ = ["apart", "packed", "unpacked", "wants_packing"]


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


_COPY = _copy.with_constants(Q=64, E=64, num_warps=4)


def _copied(source: Factor, scaling: float, result: Factor, E: int, D: int) -> None:
    """result = scaling * source."""
    r = source.rank
    grid = cdiv(r * D, 64), cdiv(E, 64), 1
    _COPY(grid, source.tensor, result.tensor, r, D, E, scaling, *source[2:5], *result[2:5])


def wants_packing(factor: Factor, E: int, rows: int) -> bool:
    """Whether neighbouring experts lie side by side, so that each element read for one costs a whole sector, and enough
    rows are routed to make up for a copy."""
    return factor.stride_e == 1 and 4 <= E <= rows


def apart(factor: Factor, E: int, D: int, dtype: torch.dtype, scaling: float) -> Factor:
    """Room for the same with one contiguous piece "d r" per expert."""
    r = factor.rank
    return Factor(factor.tensor.new_empty((E, D, r), dtype=dtype), r, D * r, 1, r, scaling)


def packed(factor: Factor | None, weight: Tensor | PackedWeight, rows: int) -> Factor | None:
    """lora_B with its experts apart, scaled and rounded as `weight` "E in out" is, where that pays; else as it is."""
    if factor is None or not wants_packing(factor, weight.shape[0], rows):
        return factor
    E, _, D = weight.shape
    result = apart(factor, E, D, weight.dtype, 1.0)
    _copied(factor, factor.scaling, result, E, D)
    return result


def unpacked(source: Factor, like: Factor, E: int, D: int) -> Tensor:
    """A gradient in the packing of the factor it belongs to, so that autograd takes it without a copy."""
    result = like._replace(tensor=torch.empty_like(like.tensor))
    _copied(source, 1.0, result, E, D)
    return result.tensor
