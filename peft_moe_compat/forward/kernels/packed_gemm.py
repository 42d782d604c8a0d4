"""The grouped product with a quantised stack: decoded ahead of it part by part where rows are many, within it where
they are few, and in between as `loaded_gemm` does it."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from ...model.packed import CODES, FLOAT8, Codec, PackedWeight
from ..grouped_mm import multiply
from . import gemm
from .common import Config, Factor, capability_of, cdiv, dot_precision, multiplied, tile_rows
from .dropout import Kept
from .gemm import Tiling, add_to, low_rank, plus_low, product_tile, programs_of, tiles_of, tiling_of, turn
from .interface import next_power
from .launch import Repeated, kernel
from .loaded_gemm import BELOW, BELOW_OF_MUCH, FROM, is_loaded, loaded_linear
from .permute import in_registers
from .routing import Route, Tiles
from .unpack import Unpacking, codec_of, packed_arguments, span_of, unpack, weight_tile

__all__ = ["AHEAD_FROM", "MANY", "linear", "unpacking_of", "unpacks_many"]

# Columns of a tile that is decoded in the product, and its steps along K.
UNPACKING = Config(64, 4, 3), 64
FLOAT8_FOR_MANY = Config(128, 8, 3), 64  # for tiles of more than 64 rows
AHEAD_FROM = 192  # rows to an expert, on average, from which on a stack is decoded ahead of the product instead
MANY = FROM, AHEAD_FROM, BELOW_OF_MUCH, BELOW  # such numbers, from each of which on other kernels may run
SCRATCH = 127 * 2**20  # bytes of weights that are decoded at a time: fewer lose more to the tails of launches


@kernel("first_expert", "end_expert")
def _product_of_some(
    x, weight, y, low, bias, offs, tiles, first_expert, end_expert, N, K, stride_y,
    factor, rank, stride_e, stride_r, stride_d, scaling,
    R: tl.constexpr, BIAS: tl.constexpr, ALONG_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """`gemm._product` of those experts alone that `weight` holds; `y` and `bias` begin where its N columns do."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offs + e - 1, mask=(e > 0) & (e < end_expert), other=0)
    needed = (tl.load(offs + e, mask=e < end_expert, other=0) - begin + BLOCK - 1) // BLOCK
    first_tile = tl.sum(tl.where(e < first_expert, needed, 0))
    count, across = tl.sum(needed) - first_tile, tl.cdiv(N, BLOCK_N)
    for i in range(tl.program_id(0), count * across, tl.num_programs(0)):
        row, column = turn(i, count, across, GROUP)
        row += first_tile
        expert, first_s = tl.load(tiles + 2 * row), tl.load(tiles + 2 * row + 1)
        product_tile(
            x, weight, y, low, bias, offs, expert, expert - first_expert, first_s, column * BLOCK_N, N, K, stride_y,
            factor, rank, stride_e, stride_r, stride_d, scaling, low,
            R, BIAS, False, ALONG_K, BLOCK, BLOCK_N, BLOCK_K, EARLY, PRECISION, DESCRIBED,
        )  # fmt: skip


@kernel(fuse=False)
def _unpacking_product(
    x, y, low, bias, offs, tiles, N, K, factor, rank, stride_e, stride_r, stride_d, scaling,
    data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
    R: tl.constexpr, BIAS: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y from packed weights, which are the left operand: few rows, so that each is decoded about once."""
    expert, s, here = tile_rows(tiles, offs, tl.program_id(1), BLOCK)
    if expert < 0:
        return
    dtype = y.dtype.element_ty
    table = in_registers(table, CODEC)
    first_n = tl.program_id(0) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    x_row = x + s.to(tl.int64)[None, :] * K
    total = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        a = tl.load(x_row + k[:, None], mask=(k[:, None] < K) & here[None, :], other=0.0)
        if CODEC[10]:
            w = weight_tile(
                data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
                expert, k, first_n, dtype, CODEC, SPAN, BLOCK_N,
            ).T  # fmt: skip
        else:
            w = weight_tile(
                data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
                expert, n, first_k, dtype, CODEC, SPAN, BLOCK_K,
            )  # fmt: skip
        total = multiplied(tl.dot(w, a, total, input_precision=PRECISION))
    result = plus_low(
        total.T, low, bias, expert, s, here, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, dtype,
        R, BIAS, PRECISION,
    )  # fmt: skip
    at = y + s.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, result.to(dtype), mask=here[:, None] & (n[None, :] < N))


def unpacks_many(codec: Codec, capability: int) -> bool:
    """Whether the product decodes, below `AHEAD_FROM`, for tiles of 128 rows too; small cards lack the registers."""
    # Of codes in tiles of 64 columns triton 3.6 compiles nothing for Blackwell (`unpacking_of`).
    return 90 <= capability < (100 if codec.kind == CODES else 120)


def unpacking_of(codec: Codec, capability: int, rows: int) -> tuple[Config, int]:
    """Which of those above, for tiles of so many rows on a device of compute capability 9.0 as 90, say."""
    if rows > 64 and codec.kind == FLOAT8:
        return FLOAT8_FOR_MANY
    config, depth = UNPACKING
    # triton 3.6 cannot compile products of 64 such columns for Blackwell: its compiler fails in a pass.
    return (config._replace(columns=32), depth) if codec.kind == CODES and capability >= 100 else (config, depth)


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    route: Route,
    low: Tensor | None,
    factor: Factor | None,
    bias: Tensor | None = None,
    kept: Kept | None = None,
    room: int = 0,
) -> Tensor:
    """`gemm.grouped_linear`, of a quantised stack too.

    Args:
        room: Bytes that the layer holds less now than at its highest, which decoded weights may take beyond `SCRATCH`.
    """
    if not isinstance(weight, PackedWeight):
        return gemm.grouped_linear(x, weight, route, low, factor, bias, kept)
    if kept is None:
        return _packed_linear(x, weight, route, low, factor, bias, room)
    return add_to(_packed_linear(x, weight, route, None, None, bias, room), route, low, factor, None, kept)


class _Part(NamedTuple):
    """What of a stack is decoded at a time: some experts, or some out-features of one. First and end of each."""

    experts: tuple[int, int]
    out: tuple[int, int]


def _parts(weight: PackedWeight, column: int, room: int) -> list[_Part]:
    """Pieces as equal as can be: of experts, in at most `SCRATCH` + `room` bytes, or where not one fits, of one's
    out-features, in `SCRATCH` alone, since kernels are compiled for how many; in whole tiles of so many columns."""
    E, K, N = weight.shape
    size, most = K * N * weight.dtype.itemsize, SCRATCH + max(room, 0)
    if size <= most:
        count = cdiv(E, most // size)
        return [_Part((E * i // count, E * (i + 1) // count), (0, N)) for i in range(count)]
    width = max(1, SCRATCH // (K * column * weight.dtype.itemsize)) * column
    width = cdiv(cdiv(N, cdiv(N, width)), column) * column
    return [_Part((e, e + 1), (n, min(n + width, N))) for e in range(E) for n in range(0, N, width)]


def _packed_linear(
    x: Tensor, weight: PackedWeight, route: Route, low: Tensor | None, factor: Factor | None, bias: Tensor | None,
    room: int,
) -> Tensor:  # fmt: skip
    """`grouped_linear` of a quantised stack: decoded in the product where few rows reach an expert, or that gains, else
    part by part ahead of the tiled product, or all at once where that does not run."""
    E, rows, columns = weight.stored
    _, K, N = weight.shape
    if is_loaded(x, weight, route):
        return loaded_linear(x, weight, route, low, factor, bias)
    few = route.large.block < 128
    if few or (route.rows < AHEAD_FROM * E and unpacks_many(weight.codec, capability_of(x.device))):
        tiles = route.small if few else route.large
        return _unpacked_in_product(x, weight, route, tiles, low, factor, bias)
    tiling = tiling_of(x)
    if not tiling or K % tiling.depth or N % (16 // x.element_size()):
        whole = unpack(weight, route.offs, (0, E), (0, rows), (0, columns))
        y = multiply(x.to(weight.dtype), whole if weight.rows_are_in else whole.mT, route.offs)
        return add_to(y, route, low, factor, bias)
    return _ahead(x, weight, route, low, factor, bias, tiling, room)


def _ahead(
    x: Tensor, weight: PackedWeight, route: Route, low: Tensor | None, factor: Factor | None, bias: Tensor | None,
    tiling: Tiling, room: int,
) -> Tensor:  # fmt: skip
    """Decoded part by part, each multiplied before the next takes its memory.

    What parts of one shape have in common is made once: the processor waits for nothing here, but two launches for each
    part are more work for it than the device has with a small one.
    """
    (E, rows, columns), (_, K, N) = weight.stored, weight.shape
    y = x.new_empty(x.shape[0], N, dtype=weight.dtype)
    u, b, (factor_at, *others), R = low_rank(y, low, factor, bias)
    tiles, along_k, (block_n, num_warps, num_stages) = route.large, not weight.rows_are_in, tiling.config
    parts = _parts(weight, block_n, room)
    scratch = x.new_empty(max((e - first_e) * (n - first_n) for (first_e, e), (first_n, n) in parts) * K, dtype=y.dtype)
    constants = {
        "R": R, "BIAS": bias is not None, "ALONG_K": along_k, "BLOCK": tiles.block, "BLOCK_N": block_n,
        "BLOCK_K": tiling.depth, "GROUP": gemm.GROUP_TILES, "EARLY": 32, "PRECISION": dot_precision(y.dtype),
        "DESCRIBED": tiling.described, "EXPERTS": next_power(E, 16), "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    made = {}  # by shape
    for (first_expert, end_expert), (first, end) in parts:
        count, width = end_expert - first_expert, end - first
        if (count, width) not in made:
            shape = (count, width, columns) if along_k else (count, rows, width)
            stack = scratch[: count * width * K].view(shape)
            product = Repeated(_product_of_some, (programs_of(x.device), 1, 1), **constants)
            operands = tiles_of(x, stack, along_k, tiles.block, tiling)
            made[count, width] = Unpacking(weight, route.offs, stack), product, operands
        unpacking, product, operands = made[count, width]
        unpacking(first_expert, *(first, 0) if along_k else (0, first))
        at = y, b, factor_at
        if first:
            shifted = factor_at.as_strided((1,), (1,), factor_at.storage_offset() + first * others[3]) if R else y
            at = y[:, first:], b if bias is None else bias[:, first:], shifted
        product(
            *operands, at[0], u, at[1], route.offs, tiles.table, first_expert, end_expert, width, K, N, at[2], *others
        )
    return y


def _unpacked_in_product(
    x: Tensor, weight: PackedWeight, route: Route, tiles: Tiles, low: Tensor | None, factor: Factor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same for few rows, each weight decoded once for each tile of rows."""
    _, K, N = weight.shape
    (block_n, num_warps, num_stages), depth = unpacking_of(weight.codec, capability_of(x.device), tiles.block)
    y = x.new_empty(x.shape[0], N, dtype=weight.dtype)
    u, b, arguments, R = low_rank(y, low, factor, bias)
    _unpacking_product(
        (cdiv(N, block_n), tiles.limit, 1), x, y, u, b, route.offs, tiles.table, N, K, *arguments,
        *packed_arguments(weight),
        R=R, BIAS=bias is not None, CODEC=codec_of(weight), SPAN=span_of(weight, min(depth, block_n)),
        BLOCK=tiles.block, BLOCK_N=block_n, BLOCK_K=depth, PRECISION=dot_precision(y.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y
