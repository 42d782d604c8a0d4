"""What the kernels share: tiles, LoRA factors, sizes. Letters as in `layout`; R is the rank padded to 16, 32, ..."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import Factor

__all__ = [
    "Config",
    "Factor",
    "cdiv",
    "dot_precision",
    "factor_tile",
    "fitting",
    "next_power",
    "tile_rows",
]


class Config(NamedTuple):
    """How a kernel is launched, found by benchmarks/tune.py: columns a step, warps, and loads in flight.

    Fixed rather than autotuned: nothing is compiled or timed when token counts vary from step to step.
    """

    columns: int
    num_warps: int
    num_stages: int


def fitting(config: Config, R: int, dtype: torch.dtype) -> Config:
    """The configuration, or a narrow one where a large rank leaves few registers, or float32 little shared memory."""
    return config if R <= 64 and dtype.itemsize == 2 else Config(32, 8, 2)


def cdiv(n: int, unit: int) -> int:
    return -(-n // unit)


def next_power(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """No tf32 where the caller asked for float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def tile_rows(tiles, offs, program, BLOCK: tl.constexpr, PARTS: tl.constexpr = 1):
    """(expert, rows, which of them belong to it) of one of a tile's parts; expert -1 where there are none."""
    tile = program // PARTS
    expert = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1) + program % PARTS * BLOCK
    rows = first + tl.arange(0, BLOCK)
    end = tl.load(offs + tl.maximum(expert, 0))
    return tl.where(first < end, expert, -1), rows, rows < end


@triton.jit
def factor_tile(
    factor, rank, stride_e, stride_r, stride_d, scaling, expert, d, D, R: tl.constexpr, dtype: tl.constexpr,
    FIRST=0,
):  # fmt: skip
    """The "R d" tile of one expert's factor, scaled in float32, rounded to `dtype`, zero past the rank and past D."""
    r = FIRST + tl.arange(0, R)
    at = (
        factor
        + expert.to(tl.int64) * stride_e
        + r[:, None].to(tl.int64) * stride_r
        + d[None, :].to(tl.int64) * stride_d
    )
    tile = tl.load(at, mask=(r[:, None] < rank) & (d[None, :] < D), other=0.0)
    return (tile.to(tl.float32) * scaling).to(dtype)
