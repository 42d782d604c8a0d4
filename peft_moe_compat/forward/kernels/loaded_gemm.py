"""The grouped product of many rows with a quantised stack that the copy engine loads packed and registers decode."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ...model.packed import CODES, PackedWeight
from .common import Config, Factor, capability_of, cdiv, factor_tile, multiplied
from .gemm import GROUP_TILES, descriptor_of, low_rank, programs_of, turn
from .launch import kernel
from .permute import in_registers
from .routing import Route, tiles_of_route
from .unpack import codec_of, numbers, packed_arguments, scaled, scales_of

__all__ = ["BELOW", "BELOW_OF_MUCH", "FROM", "is_loaded", "loaded_linear"]

# Rows, columns and steps along K of a tile: a weight serves 256 rows. Two programs share a multiprocessor, one of which
# decodes while the other multiplies.
BLOCK, CONFIG, DEPTH, PROGRAMS = 256, Config(64, 4, 3), 64, 2
# Rows to an expert, on average, from which on this is the fastest, and below which. Decoding ahead does it once for all
# rows, so wins earlier where that takes much, as of codes, or numbers less a zero point (benchmarks/NOTES.md).
FROM, BELOW_OF_MUCH, BELOW = 128, 320, 640


@triton.jit
def _tile(
    x, data, y, low, bias, expert, first_s, end_s, first_n, N, K, factor, rank, stride_e, stride_r, stride_d, scaling,
    scales, table, zero_points, scale_table, scale_scales, scale_offset,
    R: tl.constexpr, BIAS: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y. Weights are the left operand, which the multiplication takes from registers.

    SPAN columns of a tile, as stored, share a scale.
    """
    PER: tl.constexpr = 2 if CODEC[0] == 0 else 1
    IN: tl.constexpr = CODEC[10]
    HEIGHT: tl.constexpr = BLOCK_K if IN else BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N if IN else BLOCK_K
    SPANS: tl.constexpr = WIDTH // SPAN
    ONE: tl.constexpr = SPANS == 1 and CODEC[2] > 0 and CODEC[2] % HEIGHT == 0  # scale for a whole tile
    OF_ROWS: tl.constexpr = not IN and CODEC[2] == 1 and CODEC[3] >= CODEC[9]  # the same for all steps
    dtype = y.dtype.element_ty
    n = first_n + tl.arange(0, BLOCK_N)
    if OF_ROWS:
        scale, zero = scales_of(
            scales, zero_points, scale_table, scale_scales, scale_offset, expert, n, 0, n < N, CODEC
        )  # fmt: skip
        scale = scale[:, None]
        if CODEC[5]:
            zero = zero[:, None]
    total = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = x.load([first_s, k])
        first_r, first_c = (k, first_n) if IN else (first_n, k)
        first, second = numbers(data.load([expert * CODEC[8] + first_r, first_c // PER]), table, CODEC)
        number = first
        if PER == 2:
            number = tl.join(first, second).reshape(HEIGHT, WIDTH)
        if not OF_ROWS:
            r, c = first_r, first_c
            if not ONE:
                r += tl.arange(0, HEIGHT)
            here = r < CODEC[8]
            if SPANS > 1:
                r, c = r[:, None], c + SPAN * tl.arange(0, SPANS)[None, :]  # type: ignore[index]
                here = (r < CODEC[8]) & (c < CODEC[9])
            scale, zero = scales_of(
                scales, zero_points, scale_table, scale_scales, scale_offset, expert, r, c, here, CODEC
            )  # fmt: skip
            if SPANS > 1:
                number = number.reshape(HEIGHT, SPANS, SPAN)
            if not ONE:
                scale = tl.expand_dims(scale, -1)
                if CODEC[5]:
                    zero = tl.expand_dims(zero, -1)
        w = scaled(number, zero, scale, dtype, CODEC).reshape(HEIGHT, WIDTH)
        if IN:
            w = w.T
        total = multiplied(tl.dot(w, a.T, total, input_precision=PRECISION))
    s = first_s + tl.arange(0, BLOCK)
    STEP: tl.constexpr = 32 if R > 32 else R
    for first in tl.static_range(0, R, STEP if R else 1):
        u = low.load([first_s, first])
        f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, n, N, STEP, dtype, first)
        total = tl.dot(f.T, u.T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = y + s.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, total.T.to(dtype), mask=(s < end_s)[:, None] & (n[None, :] < N))


@kernel("limit", fuse=False)
def _loaded_product(
    x, half_x, data, y, low, half_low, bias, offs, tiles, limit, N, K,
    factor, rank, stride_e, stride_r, stride_d, scaling,
    scales, table, zero_points, scale_table, scale_scales, scale_offset,
    R: tl.constexpr, BIAS: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of y, several a program; of half as many rows where an expert has no more left.

    Nothing is fused, which would round differently from the formats' own.
    """
    table = in_registers(table, CODEC)
    across = tl.cdiv(N, BLOCK_N)
    count = tl.load(tiles + 2 * limit)
    for i in range(tl.program_id(0), count * across, tl.num_programs(0)):
        row, column = turn(i, count, across, GROUP)
        expert, first_s = tl.load(tiles + 2 * row), tl.load(tiles + 2 * row + 1)
        end_s = tl.load(offs + expert)
        if end_s - first_s > BLOCK // 2:
            _tile(
                x, data, y, low, bias, expert, first_s, end_s, column * BLOCK_N, N, K,
                factor, rank, stride_e, stride_r, stride_d, scaling,
                scales, table, zero_points, scale_table, scale_scales, scale_offset,
                R, BIAS, CODEC, SPAN, BLOCK, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        else:
            _tile(
                half_x, data, y, half_low, bias, expert, first_s, end_s, column * BLOCK_N, N, K,
                factor, rank, stride_e, stride_r, stride_d, scaling,
                scales, table, zero_points, scale_table, scale_scales, scale_offset,
                R, BIAS, CODEC, SPAN, BLOCK // 2, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip


def _span(weight: PackedWeight) -> int:
    """Columns of a tile, as stored, that share a scale."""
    codec, width = weight.codec, CONFIG.columns if weight.rows_are_in else DEPTH
    if codec.height and codec.width >= weight.stored[2]:
        return width
    common = math.gcd(codec.width, weight.stored[2], width)
    return common & -common


def is_loaded(x: Tensor, weight: PackedWeight, route: Route) -> bool:
    """Whether `loaded_linear` runs, and gains: on Hopper, on which alone it was timed."""
    (E, rows, columns), K, codec = weight.stored, weight.shape[1], weight.codec
    width = columns // (2 if codec.kind == CODES else 1)
    return (
        90 <= capability_of(x.device) < 100
        and x.element_size() == 2
        and K % DEPTH == 0
        and width % 16 == 0
        and x.data_ptr() % 16 == weight.data.data_ptr() % 16 == 0
        and E * max(rows, columns) < 2**31
        and _span(weight) >= 16
        and FROM * E <= route.rows < (BELOW_OF_MUCH if codec.kind == CODES or codec.zeros else BELOW) * E
    )


def loaded_linear(
    x: Tensor, weight: PackedWeight, route: Route, low: Tensor | None, factor: Factor | None, bias: Tensor | None
) -> Tensor:
    """`gemm.grouped_linear` of a quantised stack, without memory for decoded weights."""
    (E, rows, columns), (_, K, N) = weight.stored, weight.shape
    per = 2 if weight.codec.kind == CODES else 1
    y = x.new_empty(x.shape[0], N, dtype=weight.dtype)
    u, b, arguments, R = low_rank(y, low, factor, bias)
    (whole, half), (whole_u, half_u) = (
        tuple(descriptor_of(of, x.shape[0], of.shape[1], (rows, width)) for rows in (BLOCK, BLOCK // 2))
        for of, width in ((x, DEPTH), (u, min(R, 32)) if R else (x, DEPTH))
    )
    tiles = tiles_of_route(route, E, BLOCK)
    data, *others = packed_arguments(weight)
    block = (DEPTH, CONFIG.columns // per) if weight.rows_are_in else (CONFIG.columns, DEPTH // per)
    _loaded_product(
        (min(tiles.limit * cdiv(N, CONFIG.columns), PROGRAMS * programs_of(x.device)), 1, 1),
        whole, half, descriptor_of(data, E * rows, columns // per, block), y, whole_u, half_u, b, route.offs,
        tiles.table, tiles.limit, N, K, *arguments, *others,
        R=R, BIAS=bias is not None, CODEC=codec_of(weight), SPAN=_span(weight),
        BLOCK=BLOCK, BLOCK_N=CONFIG.columns, BLOCK_K=DEPTH, GROUP=GROUP_TILES, **CONFIG.options(y.dtype),
    )  # fmt: skip
    return y
