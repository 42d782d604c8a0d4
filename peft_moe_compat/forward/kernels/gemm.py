"""The grouped product with everything that is added to it before the one rounding: y = x W + low @ factor + bias."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..grouped_mm import multiply
from .common import Config, Factor, capability_of, cdiv, dot_precision, factor_tile, tile_rows
from .dropout import Kept, enlarged, stored
from .launch import Form, kernel
from .routing import Route

__all__ = [
    "GROUP_TILES",
    "Tiling",
    "add_to",
    "descriptor_of",
    "grouped_linear",
    "low_rank",
    "plus_low",
    "product_tile",
    "programs_of",
    "tiles_of",
    "tiling_of",
    "turn",
]

PER_SM, GROUP_TILES = 1, 8


class Tiling(NamedTuple):
    """How the tiled product runs on a kind of device.

    Attributes:
        config: For rows of 16 bits.
        depth: Steps along K, for rows of 16 bits.
        described: Whether a copy engine loads the tiles, by tensor descriptors, or each thread its part, by addresses.
    """

    config: Config
    depth: int
    described: bool

    def of(self, dtype: torch.dtype) -> Tiling:
        return self if dtype.itemsize == 2 else Tiling(Config(64, 4, 2), 32, self.described)


# By the compute capability from which on. Only Hopper's row was ever timed (benchmarks/tune.py).
TILINGS = {
    # No copy engine, and descriptors that stand for addresses are not loaded ahead. Products from registers: 256
    # columns spill. Three stages are 64 KiB, 96 by triton 3.5, of 99 (163 on an A100).
    80: Tiling(Config(128, 8, 3), 64, described=False),
    90: Tiling(Config(256, 8, 4), 64, described=True),  # 204 KiB of 227, as on compute capability 10.x
    120: Tiling(Config(128, 8, 3), 64, described=True),  # the same
}


@triton.jit
def plus_low(
    total, low, bias, expert, s, here, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, dtype: tl.constexpr,
    R: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + low @ factor + bias, at rows `s` of one expert and columns `n`, in float32."""
    STEP: tl.constexpr = 32 if R > 32 else R
    for first in tl.static_range(0, R, STEP if R else 1):
        part = low + s.to(tl.int64)[:, None] * R + first + tl.arange(0, STEP)[None, :]
        u = tl.load(part, mask=here[:, None], other=0.0)
        f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, n, N, STEP, dtype, first)
        total = tl.dot(u, f, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return total


@kernel()
def _add(
    y, low, bias, offs, tiles, N, factor, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y += low @ factor + bias, in place, added in float32; where dropped, those of what was kept."""
    expert, s, here = tile_rows(tiles, offs, tl.program_id(0), BLOCK)
    if expert < 0:
        return
    dtype = y.dtype.element_ty
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = here[:, None] & (n[None, :] < N)
    at = y + s.to(tl.int64)[:, None] * N + n[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # a small tile is loaded by several warps: none may store before all have read
    added = plus_low(
        tl.zeros([BLOCK, BLOCK_N], tl.float32) if DROP else total,
        low, bias, expert, s, here, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, dtype,
        R, BIAS, PRECISION,
    )  # fmt: skip
    if DROP:
        added = total + tl.where(stored(words, s, here, tl.program_id(1) * BLOCK_N, N, BLOCK, BLOCK_N), added, 0.0)
    tl.store(at, added.to(dtype), mask=mask)


@triton.jit
def product_tile(
    x, weight, y, low, bias, offs, expert, stack, first_s, first_n, N, K, stride_y,
    factor, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, ALONG_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of y; `stack` is the expert's place in `weight`."""
    dtype = y.dtype.element_ty
    end = tl.load(offs + expert)
    s, n = first_s + tl.arange(0, BLOCK), first_n + tl.arange(0, BLOCK_N)
    here = s < end
    low_row = low + s.to(tl.int64)[:, None] * R
    if R and R <= EARLY and not DROP:  # read before the loop, for use after it
        u = tl.load(low_row + tl.arange(0, R)[None, :], mask=here[:, None], other=0.0)
        f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, n, N, R, dtype)
    total = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    if DROP:  # ahead of the loop, where no other sum takes registers
        total = plus_low(
            total, low, bias, expert, s, here, n, N, factor, rank, stride_e, stride_r, stride_d, scaling, dtype,
            R, False, PRECISION,
        )  # fmt: skip
        total = tl.where(stored(words, s, here, first_n, N, BLOCK, BLOCK_N), total, 0.0)
    if not DESCRIBED:
        a_at = x + s.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        b_at = weight + stack.to(tl.int64) * N * K
        if ALONG_K:
            b_at += n.to(tl.int64)[None, :] * K + tl.arange(0, BLOCK_K)[:, None]
        else:
            b_at += tl.arange(0, BLOCK_K).to(tl.int64)[:, None] * N + n[None, :]
    for k in range(0, K, BLOCK_K):
        if not DESCRIBED:
            a = tl.load(a_at, mask=here[:, None], other=0.0)
            b = tl.load(b_at, mask=n[None, :] < N, other=0.0)
            a_at += BLOCK_K
            b_at += BLOCK_K if ALONG_K else BLOCK_K * N
        elif ALONG_K:
            a = x.load([first_s, k])
            b = weight.load([stack * N + first_n, k]).T
        else:
            a = x.load([first_s, k])
            b = weight.load([stack * K + k, first_n])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if R and R <= EARLY and not DROP:
        total = tl.dot(u, f, total, input_precision=PRECISION)
    if R > EARLY and not DROP:
        for first in tl.static_range(0, R, 32):
            u = tl.load(low_row + first + tl.arange(0, 32)[None, :], mask=here[:, None], other=0.0)
            f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, n, N, 32, dtype, first)
            total = tl.dot(u, f, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + expert.to(tl.int64) * stride_y + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = y + s.to(tl.int64)[:, None] * stride_y + n[None, :]
    tl.store(at, total.to(dtype), mask=here[:, None] & (n[None, :] < N))


@triton.jit
def turn(i, count, across, GROUP: tl.constexpr):
    """(row tile, column tile) of the i-th: GROUP row tiles take turns over the columns, so that L2 serves both."""
    band = i // (GROUP * across)
    height = tl.minimum(count - band * GROUP, GROUP)
    inside = i - band * GROUP * across
    return band * GROUP + inside % height, inside // height


@kernel("limit")
def _product(
    x, weight, y, low, bias, offs, tiles, limit, N, K,
    factor, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, ALONG_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Tiles of y, several a program. `weight` is "(E N) K" where ALONG_K, else "(E K) N"; both as of `tiles_of`."""
    across = tl.cdiv(N, BLOCK_N)
    count = tl.load(tiles + 2 * limit)
    for i in range(tl.program_id(0), count * across, tl.num_programs(0)):
        row, column = turn(i, count, across, GROUP)
        expert, first_s = tl.load(tiles + 2 * row), tl.load(tiles + 2 * row + 1)
        product_tile(
            x, weight, y, low, bias, offs, expert, expert, first_s, column * BLOCK_N, N, K, N,
            factor, rank, stride_e, stride_r, stride_d, scaling, words,
            R, BIAS, DROP, ALONG_K, BLOCK, BLOCK_N, BLOCK_K, EARLY, PRECISION, DESCRIBED,
        )  # fmt: skip


def low_rank(
    y: Tensor, low: Tensor | None, factor: Factor | None, bias: Tensor | None
) -> tuple[Tensor, Any, tuple[Any, ...], int]:
    """(low, bias, the factor's arguments, R) with stand-ins for what is not there."""
    if low is None or factor is None:
        return y, y if bias is None else bias, (y, 0, 0, 0, 0, 1.0), 0
    return low, y if bias is None else bias, factor, low.shape[1]


def tiles_fit(x: Tensor, weight: Tensor, depth: int) -> bool:
    """Whether the tiled product can read both: packed stacks on 16 bytes, and K in whole tiles."""
    E, K, N = weight.shape
    stride = weight.stride()
    packed = stride == ((K * N, 1, K) if stride[1] == 1 else (K * N, N, 1))
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == weight.data_ptr() % 16 == 0 and K % unit == N % unit == 0
    return packed and aligned and K % depth == 0 and E * max(K, N) < 2**31


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    route: Route,
    low: Tensor | None,
    factor: Factor | None,
    bias: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """y = x W + low @ factor + bias of each row's expert, rounded once where the tiled product runs.

    Args:
        x: "S in".
        weight: "E in out", any strides; the dtype of the result.
        low: "S R".
        factor: "E r out".
        bias: "E out".
        kept: Of the rows that the result is the gradient of, where they met the factor.

    Returns:
        "S out"; rows past `offs[-1]` are undefined.
    """
    tiling = tiling_of(x)
    if tiling and route.large.block >= 64 and tiles_fit(x, weight, tiling.depth):
        return _tiled(x, weight, route, low, factor, bias, kept, tiling)
    return add_to(multiply(x.to(weight.dtype), weight, route.offs), route, low, factor, bias, kept)


@functools.cache
def _add_of(R: int, bias: bool, drops: bool, block: int, columns: int, dtype: torch.dtype) -> Form:
    return _add.with_constants(
        R=R, BIAS=bias, DROP=drops, BLOCK=block, BLOCK_N=columns, PRECISION=dot_precision(dtype), num_warps=4
    )


def add_to(
    y: Tensor, route: Route, low: Tensor | None, factor: Factor | None, bias: Tensor | None, kept: Kept | None = None
) -> Tensor:
    """y += low @ factor + bias in place; with `kept`, the gradient of rows of which that met the factor."""
    if low is not None or bias is not None:
        u, b, at, R = low_rank(y, low, factor and enlarged(factor, kept), bias)
        tiles, block = route.small, 128 if R <= 64 else 64
        _add_of(R, bias is not None, kept is not None, tiles.block, block, y.dtype)(
            (tiles.limit, cdiv(y.shape[1], block), 1), y, u, b, route.offs, tiles.table, y.shape[1], *at,
            y if kept is None else kept.words,
        )  # fmt: skip
    return y


TILED = True


@functools.cache
def programs_of(device: torch.device) -> int:
    """How many programs of the tiled product a device runs at once."""
    if device.type != "cuda":
        return 4  # triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count * PER_SM


@functools.cache
def _tiling(device: torch.device, dtype: torch.dtype) -> Tiling | None:
    rows = [least for least in TILINGS if least <= capability_of(device)]
    return TILINGS[max(rows)].of(dtype) if rows else None


def tiling_of(x: Tensor) -> Tiling | None:
    """How the tiled product runs for such rows on their device; None where it does not."""
    return _tiling(x.device, x.dtype) if TILED else None


@functools.lru_cache(1024)
def _described(rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a descriptor of such a matrix, checked, without the tensor."""
    checked = TensorDescriptor(torch.empty(0, dtype=dtype), [rows, columns], [columns, 1], [*block])
    return {name: value for name, value in vars(checked).items() if name != "base"}


def descriptor_of(tensor: Tensor, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
    """Of a matrix of which the tensor is all, on 16 bytes; triton's own checks take as long as a launch."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(_described(rows, columns, block, tensor.dtype), base=tensor)
    return descriptor


def tiles_of(x: Tensor, stack: Tensor, along_k: bool, rows: int, tiling: Tiling) -> tuple[Any, Any]:
    """x "S K" and a contiguous stack, "E N K" where `along_k`, else "E K N", as the product reads them."""
    if not tiling.described:
        return x, stack
    (E, height, width), (columns, depth) = stack.shape, (tiling.config.columns, tiling.depth)
    block = (columns, depth) if along_k else (depth, columns)
    return descriptor_of(x, x.shape[0], x.shape[1], (rows, depth)), descriptor_of(stack, E * height, width, block)


@functools.cache  # with `GROUP_TILES` as it was
def _product_of(R: int, bias: bool, drops: bool, along_k: bool, block: int, tiling: Tiling, dtype: torch.dtype) -> Form:
    return _product.with_constants(
        R=R, BIAS=bias, DROP=drops, ALONG_K=along_k, BLOCK=block, BLOCK_N=tiling.config.columns, BLOCK_K=tiling.depth,
        GROUP=GROUP_TILES, EARLY=32, DESCRIBED=tiling.described, **tiling.config.options(dtype),
    )  # fmt: skip


def _tiled(
    x: Tensor,
    weight: Tensor,
    route: Route,
    low: Tensor | None,
    factor: Factor | None,
    bias: Tensor | None,
    kept: Kept | None,
    tiling: Tiling,
) -> Tensor:
    K, N = weight.shape[1:]
    y = x.new_empty(x.shape[0], N, dtype=weight.dtype)
    u, b, at, R = low_rank(y, low, factor and enlarged(factor, kept), bias)
    tiles, along_k = route.large, weight.stride(1) == 1
    _product_of(R, bias is not None, kept is not None, along_k, tiles.block, tiling, y.dtype)(
        (min(tiles.limit * cdiv(N, tiling.config.columns), programs_of(x.device)), 1, 1),
        *tiles_of(x, weight.mT if along_k else weight, along_k, tiles.block, tiling),
        y, u, b, route.offs, tiles.table, tiles.limit, N, K, *at, y if kept is None else kept.words,
    )  # fmt: skip
    return y
