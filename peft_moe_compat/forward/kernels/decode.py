"""A forward of few rows, as in decoding: bound by reading each chosen expert once and by the number of launches.

Four launches, no sort and no gathered rows: u = x A^T; h, from x, u and both halves of the up projection; u = h A^T;
and the down projection of a token's k experts with their weighted sum. Products are sums in float32, not matrix units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model.packed import PackedWeight
from .activation import _act, _gate
from .common import Factor, cdiv, factor_tile
from .interface import Nonlinearity, next_power, padded_rank
from .launch import kernel
from .permute import in_registers
from .unpack import codec_of, packed_arguments, span_of, weight_tile

__all__ = ["MOST_PACKED_ROWS", "MOST_ROWS", "few_rows", "most_rows"]

MOST_ROWS, MOST_PACKED_ROWS = 128, 16


@triton.jit
def _expert(index, at, num_experts):
    """The expert of a routed row, and whether it is computed here."""
    expert = tl.load(index + at).to(tl.int32)
    here = (expert >= 0) & (expert < num_experts)
    return tl.where(here, expert, 0), here


@triton.jit
def _row_product(
    x, weight, expert, n, N, K, stride_e, stride_k, stride_n,
    scales, table, zero_points, scale_table, scale_scales, scale_offset,
    dtype: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row times one expert's columns `n`, in float32; with a CODEC these are stored rows, decoded to `dtype`."""
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if CODEC is not None:
        table = in_registers(table, CODEC)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if CODEC is None:
            rows = weight + expert.to(tl.int64) * stride_e + n[:, None].to(tl.int64) * stride_n
            w = tl.load(rows + k[None, :] * stride_k, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        else:
            w = weight_tile(
                weight, scales, table, zero_points, scale_table, scale_scales, scale_offset,
                expert, n, start, dtype, CODEC, SPAN, BLOCK_K,
            )  # fmt: skip
        total += w.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _low_term(
    low, bias, expert, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, R: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """low @ factor + bias at the columns `n` of one row."""
    total = tl.zeros([BLOCK_N], tl.float32)
    if R:
        f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, n, N, R, tl.float32)
        total += tl.sum(f * tl.load(low + tl.arange(0, R)).to(tl.float32)[:, None], 0)
    if BIAS:
        total += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
    return total


@kernel()
def _low(
    source, low, index, D, k, num_experts, factor, rank, stride_e, stride_r, stride_d, scaling,
    R: tl.constexpr, SOME: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SOME elements of one row of source @ factor^T; row s reads source[s // k]."""
    s = tl.program_id(0)
    expert, _ = _expert(index, s, num_experts)
    row = source + (s // k).to(tl.int64) * D
    first = tl.program_id(1) * SOME
    total = tl.zeros([SOME, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, d, D, SOME, tl.float32, first)
        total += f * tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(low + s * R + first + tl.arange(0, SOME), tl.sum(total, 1))


@kernel()
def _up(
    hidden, weight, h, low, bias, index, H, I, k, num_experts, alpha, limit, stride_we, stride_wk, stride_wn,
    scales, table, zero_points, scale_table, scale_scales, scale_offset,
    factor, rank, stride_e, stride_r, stride_d, scaling,
    R: tl.constexpr, BIAS: tl.constexpr, NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    CODEC: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some of the activations of one row."""
    s = tl.program_id(0)
    expert, _ = _expert(index, s, num_experts)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, low_row = hidden + (s // k).to(tl.int64) * H, low + s * R
    N = 2 * I if GATED else I
    n = tl.where(i < I, 2 * i if INTERLEAVED else i, N)
    g = _row_product(
        x, weight, expert, n, N, H, stride_we, stride_wk, stride_wn,
        scales, table, zero_points, scale_table, scale_scales, scale_offset, h.dtype.element_ty, CODEC,
        SPAN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    g += _low_term(low_row, bias, expert, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, R, BIAS, BLOCK_N)
    if GATED:
        n = tl.where(i < I, 2 * i + 1 if INTERLEAVED else I + i, N)
        u = _row_product(
            x, weight, expert, n, N, H, stride_we, stride_wk, stride_wn,
            scales, table, zero_points, scale_table, scale_scales, scale_offset, h.dtype.element_ty, CODEC,
            SPAN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        u += _low_term(
            low_row, bias, expert, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, R, BIAS, BLOCK_N
        )
        value, _, _ = _gate(g, u, alpha, limit, NAME)
    else:
        value, _ = _act(g, NAME)
    tl.store(h + s.to(tl.int64) * I + i, value.to(h.dtype.element_ty), mask=i < I)


@kernel()
def _down(
    h, weight, weights, out, low, bias, index, I, H, k, num_experts, stride_we, stride_wk, stride_wn,
    scales, table, zero_points, scale_table, scale_scales, scale_offset,
    factor, rank, stride_e, stride_r, stride_d, scaling,
    R: tl.constexpr, BIAS: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some of the output of one token, its experts in order."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in range(k):
        s = token * k + j
        expert, here = _expert(index, s, num_experts)
        y = _row_product(
            h + s.to(tl.int64) * I, weight, expert, n, H, I, stride_we, stride_wk, stride_wn,
            scales, table, zero_points, scale_table, scale_scales, scale_offset, h.dtype.element_ty, CODEC,
            SPAN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y += _low_term(
            low + s * R, bias, expert, n, H, factor, rank, stride_e, stride_r, stride_d, scaling, R, BIAS, BLOCK_N
        )
        total += tl.where(here, tl.load(weights + s).to(tl.float32) * y, 0.0)  # another rank's row may overflow here
    tl.store(out + token.to(tl.int64) * H + n, total.to(out.dtype.element_ty), mask=n < H)


def most_rows(*weights: Tensor | PackedWeight) -> int:
    """How many routed rows these kernels are for. Decoding a weight for each of its rows pays for fewer of them."""
    most = MOST_ROWS
    for weight in weights:
        if isinstance(weight, PackedWeight):
            if weight.rows_are_in:
                return 0  # a gate's columns may then share a byte with those of `up`
            most = MOST_PACKED_ROWS
    return most


def _weight(weight: Tensor | PackedWeight) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(the weight or its bytes, its strides and what else it is decoded by, constants).

    Columns and contracted elements of a step are wide along whichever lies contiguous.
    """
    if isinstance(weight, PackedWeight):
        data, *others = packed_arguments(weight)
        sizes = {"BLOCK_N": 16, "BLOCK_K": 256}
        return data, (0, 0, 0, *others), {"CODEC": codec_of(weight), "SPAN": span_of(weight, 256), **sizes}
    sizes = {"BLOCK_N": 16, "BLOCK_K": 256} if weight.stride(1) == 1 else {"BLOCK_N": 64, "BLOCK_K": 64}
    return weight, (*weight.stride(), *[weight] * 6), {"CODEC": None, "SPAN": 0, **sizes}


def _products(source: Tensor, index: Tensor, k: int, num_experts: int, factor: Factor | None) -> Tensor:
    """source @ factor^T of every routed row, "S R" float32; `source` itself stands in where there is no factor."""
    if factor is None:
        return source
    S, D, R = index.numel(), source.shape[1], padded_rank(factor.rank)
    low = source.new_empty(S, R, dtype=torch.float32)
    block = min(next_power(D, 16), 1024)
    _low(
        (S, R // 4, 1), source, low, index, D, k, num_experts, *factor, R=R, SOME=4, BLOCK_D=block,
        num_warps=4,
    )  # fmt: skip
    return low


def few_rows(nonlinearity: Nonlinearity, hidden: Tensor, index: Tensor, weights: Tensor, up: Any, down: Any) -> Tensor:
    """The layer's output, without what a backward would need.

    Args:
        hidden: "T H".
        index, weights: "T k"; ids outside 0..E-1 contribute nothing.
        up, down: See `layer.Projection`.
    """
    (T, k), (E, H, _) = index.shape, up.weight.shape
    I = down.weight.shape[1]
    nothing = (hidden, 0, 0, 0, 0, 1.0)
    low = _products(hidden, index, k, E, up.A)
    h = hidden.new_empty(T * k, I, dtype=up.weight.dtype)
    weight, others, tile = _weight(up.weight)
    _up(
        (T * k, cdiv(I, tile["BLOCK_N"]), 1), hidden, weight, h, low, hidden if up.bias is None else up.bias,
        index, H, I, k, E, nonlinearity.alpha, nonlinearity.limit, *others,
        *(up.B or nothing),
        R=low.shape[1] if up.B else 0, BIAS=up.bias is not None, NAME=nonlinearity.name, GATED=nonlinearity.gated,
        INTERLEAVED=nonlinearity.interleaved, **tile, num_warps=4,
    )  # fmt: skip
    low = _products(h, index, 1, E, down.A)
    out = hidden.new_empty(T, H)
    weight, others, tile = _weight(down.weight)
    _down(
        (T, cdiv(H, tile["BLOCK_N"]), 1), h, weight, weights, out, low,
        hidden if down.bias is None else down.bias, index, I, H, k, E, *others,
        *(down.B or nothing),
        R=low.shape[1] if down.B else 0, BIAS=down.bias is not None, **tile, num_warps=4,
    )  # fmt: skip
    return out
