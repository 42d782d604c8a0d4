"""A counting sort of the routed rows by expert, stable and without waiting for the device."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .interface import next_power
from .launch import Form, kernel

__all__ = ["Route", "Tiles", "route", "steps", "tiles_of_route"]

_STEP = 64  # rows one program of the sort compares with each other


class Tiles(NamedTuple):
    """Row tiles, none of which crosses an expert.

    Attributes:
        table: "(limit + 1) 2" int32, (expert, first row); expert -1 where fewer tiles are needed. Last, their number.
        limit: Upper bound of the tiles needed, known without the routing.
        block: Rows of a tile.
    """

    table: Tensor
    limit: int
    block: int


class Route(NamedTuple):
    """Where each routed row goes.

    Attributes:
        order: "S" int32, the index into the flat "(T k)" of the row at a sorted place.
        position: "S" int32, the inverse; -1 for a row that no expert here computes.
        offs: "E" int32, where each expert's rows end.
        small, large: Tiles for the kernels bound by memory, and for the matrix products.
        rows: S. `order` and `position` may be longer.
        places: "S" int32, which row of the whole batch each sorted one is, where `order` does not say it.
    """

    order: Tensor
    position: Tensor
    offs: Tensor
    small: Tiles
    large: Tiles
    rows: int
    places: Tensor | None = None


@triton.jit
def _ids(index, at, S, num_experts):
    """Experts of the rows at `at`, and which of them are computed here."""
    ids = tl.load(index + at, mask=at < S, other=-1).to(tl.int32)
    return ids, (ids >= 0) & (ids < num_experts)


@kernel("S")
def _count(index, counts, S, num_experts, E: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """How many rows of this program's chunk go to each expert."""
    chunk = tl.program_id(0)
    found = tl.zeros([E], tl.int32)
    for start in range(0, CHUNK, STEP):
        ids, here = _ids(index, chunk * CHUNK + start + tl.arange(0, STEP), S, num_experts)
        found += tl.histogram(ids, E, mask=here)
    tl.store(counts + chunk * E + tl.arange(0, E), found)


@triton.jit
def _write_tiles(tiles, limit, total, start, t, BLOCK: tl.constexpr, E: tl.constexpr):
    """Entries `t` of a table of row tiles, from the row count and first row of each expert."""
    needed = (total + BLOCK - 1) // BLOCK
    last = tl.cumsum(needed, 0)
    expert = tl.sum((last[None, :] <= t[:, None]).to(tl.int32), 1)
    own = tl.arange(0, E)[None, :] == expert[:, None]
    first = tl.sum(tl.where(own, (start - (last - needed) * BLOCK)[None, :], 0), 1) + t * BLOCK
    number = tl.sum(needed, 0)
    used = t < number
    tl.store(tiles + 2 * limit + t, number, mask=t == 0)
    tl.store(tiles + 2 * t, tl.where(used, expert, -1), mask=t < limit)
    tl.store(tiles + 2 * t + 1, tl.where(used, first, 0), mask=t < limit)


@kernel("S", "chunks", "num_small", "num_large", "per_program")
def _place(
    index, counts, order, position, offs, small, large,
    S, num_experts, chunks, num_small, num_large, per_program,
    SMALL: tl.constexpr, LARGE: tl.constexpr,
    E: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, MANY: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    experts = tl.arange(0, E)
    all_rows, rows_before = tl.zeros([MANY, E], tl.int32), tl.zeros([MANY, E], tl.int32)
    for c in range(0, chunks, MANY):
        of = c + tl.arange(0, MANY)
        found = tl.load(counts + of[:, None] * E + experts[None, :], mask=of[:, None] < chunks, other=0)
        all_rows += found
        rows_before += tl.where(of[:, None] < chunk, found, 0)
    total, before = tl.sum(all_rows, 0), tl.sum(rows_before, 0)
    ends = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offs + experts, ends, mask=experts < num_experts)
    reached = ends - total + before
    i = tl.arange(0, STEP)
    for start in range(0, CHUNK, STEP):
        at = chunk * CHUNK + start + i
        ids, here = _ids(index, at, S, num_experts)
        others, _ = _ids(index, at, S, num_experts)  # loaded again, to lie along the other axis
        rank = tl.sum(((ids[:, None] == others[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        place = tl.gather(reached, tl.where(here, ids, 0), 0) + rank
        tl.store(position + at, tl.where(here, place, -1), mask=at < S)
        tl.store(order + place, at, mask=(at < S) & here)
        reached += tl.histogram(ids, E, mask=here)
    for start in range(0, per_program, TABLE):
        t = chunk * per_program + start + tl.arange(0, TABLE)
        _write_tiles(small, num_small, total, ends - total, t, SMALL, E)
        _write_tiles(large, num_large, total, ends - total, t, LARGE, E)


@kernel("limit")
def _tiles(offs, tiles, limit, num_experts, BLOCK: tl.constexpr, E: tl.constexpr, TABLE: tl.constexpr):
    """`_write_tiles` of rows that are sorted."""
    e = tl.arange(0, E)
    start = tl.load(offs + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    total = tl.load(offs + e, mask=e < num_experts, other=0) - start
    _write_tiles(tiles, limit, total, start, tl.program_id(0) * TABLE + tl.arange(0, TABLE), BLOCK, E)


def tiles_of_route(route: Route, num_experts: int, block: int) -> Tiles:
    """Tiles of another height, of rows that are sorted."""
    limit, E = min(route.rows, route.rows // block + num_experts), next_power(num_experts, 16)
    table = route.offs.new_empty(2 * limit + 2)
    _tiles((cdiv(limit, 16), 1, 1), route.offs, table, limit, num_experts, BLOCK=block, E=E, TABLE=16)
    return Tiles(table, limit, block)


def steps(S: int, num_experts: int) -> tuple[int, int, int]:
    """Rows compared with each other at once, rows of a program, and programs whose counts are added up at once."""
    step = min(_STEP, next_power(S, 16))
    chunk = step * min(16, next_power(cdiv(S, 256 * step)))  # few enough that each program can add up all counts
    return step, chunk, min(4096 // next_power(num_experts, 16), next_power(cdiv(S, chunk)))


@lru_cache(1024)
def _plan(S: int, num_experts: int, small: int, large: int) -> tuple[int, int, int, int, int, int, int, list[int]]:
    """The padded E, `steps`, programs, bounds of the large and the small tiles, and sizes of what `route` allocates.

    One allocation, every part on 16 bytes, so that a kernel is compiled once. Parts may be longer than they need be.
    """
    E, (step, chunk, together) = next_power(num_experts, 16), steps(S, num_experts)
    chunks = cdiv(S, chunk)
    few, many = min(S, S // large + num_experts), min(S, S // small + num_experts)
    sizes = [size + -size % 4 for size in (S, S, num_experts, 2 * many + 2, 2 * few + 2, chunks * E)]
    return E, step, chunk, together, chunks, few, many, sizes


@cache
def _counting(E: int, chunk: int, step: int) -> Form:
    return _count.with_constants(E=E, CHUNK=chunk, STEP=step)


@cache
def _placing(small: int, large: int, E: int, chunk: int, step: int, together: int) -> Form:
    return _place.with_constants(
        SMALL=small, LARGE=large, E=E, CHUNK=chunk, STEP=step, MANY=together, TABLE=16, num_warps=8
    )


def route(top_k_index: Tensor, num_experts: int, small: int, large: int) -> Route:
    """Sorts the routed rows by expert.

    Args:
        top_k_index: "T k"; ids outside 0..E-1 mark rows computed elsewhere.
        num_experts: E.
        small, large: Rows of the two kinds of tiles.
    """
    S = top_k_index.numel()
    E, step, chunk, together, chunks, few, many, sizes = _plan(S, num_experts, small, large)
    parts = torch.empty(sum(sizes), dtype=torch.int32, device=top_k_index.device).split_with_sizes(sizes)
    order, position, offs, small_table, large_table, counts = parts
    index = top_k_index.contiguous()
    grid = chunks, 1, 1
    _counting(E, chunk, step)(grid, index, counts, S, num_experts)
    _placing(small, large, E, chunk, step, together)(
        grid, index, counts, order, position, offs, small_table, large_table,
        S, num_experts, chunks, many, few, cdiv(many, chunks),
    )  # fmt: skip
    if offs.shape[0] != num_experts:
        offs = offs[:num_experts]
    return Route(order, position, offs, Tiles(small_table, many, small), Tiles(large_table, few, large), S)
