"""Between tokens and routed rows: the gather with x A^T in the same pass, and the weighted sum back."""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from .common import Config, Factor, cdiv, factor_tile, fitting, roomy, tile_rows
from .dropout import Kept, enlarged, stored
from .interface import next_power, padded_rank
from .launch import Form, kernel
from .routing import Route

__all__ = ["combine", "gather", "project"]


GATHER = Config(128, 8, 3)


@kernel()
def _gather(
    source, rows, low, dots, vector, order, offs, tiles, D, k,
    factor, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, GATHER: tl.constexpr, DOTS: tl.constexpr, DROP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows: rows = source[token] where gathered, low = kept rows @ factor^T, dots = <rows, vector>."""
    expert, s, here = tile_rows(tiles, offs, tl.program_id(0), BLOCK)
    if expert < 0:
        return
    dtype = rows.dtype.element_ty
    to_row = rows + s.to(tl.int64)[:, None] * D
    if GATHER:
        from_row = source + (tl.load(order + s, mask=here, other=0) // k).to(tl.int64)[:, None] * D
    else:
        from_row = source + s.to(tl.int64)[:, None] * D
    product = tl.zeros([BLOCK, R if R else 1], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = here[:, None] & (d[None, :] < D)
        x = tl.load(from_row + d[None, :], mask=mask, other=0.0).to(dtype)
        if GATHER:
            tl.store(to_row + d[None, :], x, mask=mask)
        if R:
            f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, d, D, R, dtype)
            met = x
            if DROP:
                met = tl.where(stored(words, s, here, start, D, BLOCK, BLOCK_D), x, 0.0)
            product = tl.dot(met, f.trans(), product, input_precision=PRECISION)
        if DOTS:
            v = tl.load(vector + expert.to(tl.int64) * D + d, mask=d < D, other=0.0)
            dot += tl.sum(x.to(tl.float32) * v.to(tl.float32)[None, :], 1)
    if R:
        at = low + s.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(at, product.to(dtype), mask=here[:, None])
    if DOTS:
        tl.store(dots + s, dot, mask=here)


@cache
def _gather_of(
    R: int, gathers: bool, dots: bool, drops: bool, block: int, config: Config, dtype: torch.dtype
) -> Form:  # fmt: skip
    return _gather.with_constants(
        R=R, GATHER=gathers, DOTS=dots, DROP=drops, BLOCK=block, BLOCK_D=config.columns, **config.options(dtype)
    )


def gather(
    source: Tensor,
    route: Route,
    k: int,
    dtype: torch.dtype,
    factor: Factor | None,
    vector: Tensor | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of `source` in the order of the experts, and their product with the expert's factor.

    Args:
        source: "T d".
        dtype: Of the result.
        factor: "E r d".
        vector: "E d".
        kept: Of the rows that meet the factor.

    Returns:
        rows "S d", rows @ factor^T "S R" (None without a factor), <rows, vector> "S" float32 (None without a vector).
    """
    S, D = route.rows, source.shape[1]
    rows = source.new_empty(S, D, dtype=dtype)
    R = padded_rank(factor.rank) if factor else 0
    low = source.new_empty(S, R, dtype=dtype) if factor else None
    dots = source.new_empty(S, dtype=torch.float32) if vector is not None else None
    tiles, config = route.small, fitting(GATHER, R, dtype, roomy(rows.device))
    unused = (rows, 0, 0, 0, 0, 1.0)
    _gather_of(R, True, vector is not None, kept is not None, tiles.block, config, dtype)(
        (tiles.limit, 1, 1), source.contiguous(), rows, low if factor else rows, dots if dots is not None else rows,
        vector if vector is not None else rows, route.order, route.offs, tiles.table, D, k,
        *(enlarged(factor, kept) if factor else unused), rows if kept is None else kept.words,
    )  # fmt: skip
    return rows, low, dots


def project(rows: Tensor, route: Route, factor: Factor | None, kept: Kept | None = None) -> Tensor | None:
    """Kept rows @ factor^T of each row's expert: "S d" -> "S R"; None without a factor."""
    if factor is None:
        return None
    tiles, R = route.small, padded_rank(factor.rank)
    config = fitting(GATHER, R, rows.dtype, roomy(rows.device))
    low = rows.new_empty(rows.shape[0], R)
    _gather_of(R, False, False, kept is not None, tiles.block, config, rows.dtype)(
        (tiles.limit, 1, 1), rows, rows, low, rows, rows, route.order, route.offs, tiles.table, rows.shape[1], 1,
        *enlarged(factor, kept), rows if kept is None else kept.words,
    )  # fmt: skip
    return low


@kernel()
def _combine(rows, position, weights, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token: the sum of its k rows, always in the order of k and in float32."""
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(K):
        at = token.to(tl.int64) * K + j
        place = tl.load(position + at)
        row = tl.load(rows + place.to(tl.int64) * D + d, mask=d < tl.where(place >= 0, D, 0), other=0.0).to(tl.float32)
        total += row * tl.load(weights + at).to(tl.float32) if WEIGHTED else row
    tl.store(out + token.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)


@cache
def _combine_of(k: int, weighted: bool, block: int) -> Form:
    return _combine.with_constants(K=k, WEIGHTED=weighted, BLOCK_D=block, num_warps=4)


def combine(rows: Tensor, route: Route, weights: Tensor | None, k: int, dtype: torch.dtype) -> Tensor:
    """out[t] = sum over j of weights[t, j] * rows[position[t, j]]: "S d" -> "T d"; plain sum without weights."""
    D, T = rows.shape[1], route.rows // k
    out = rows.new_empty(T, D, dtype=dtype)
    block = min(1024, next_power(D))
    grid = T, cdiv(D, block), 1
    _combine_of(k, weights is not None, block)(
        grid, rows, route.position, weights if weights is not None else rows, out, D
    )
    return out
