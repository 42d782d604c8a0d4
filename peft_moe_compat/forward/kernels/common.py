"""What the kernels share: tiles, LoRA factors, sizes. Letters as in `layout`; R is the rank padded to 16, 32, ..."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...layout import Factor

__all__ = [
    "INTERPRETED",
    "Config",
    "Factor",
    "capability_of",
    "cdiv",
    "dot_precision",
    "factor_tile",
    "fitting",
    "multiplied",
    "roomy",
    "tile_rows",
]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # triton's interpreter runs no assembly


class Config(NamedTuple):
    """How a kernel is launched, found by benchmarks/tune.py: columns a step, warps, and loads in flight.

    Fixed rather than autotuned: nothing is compiled or timed when token counts vary from step to step.
    """

    columns: int
    num_warps: int
    num_stages: int

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What every launch takes of it, and how it multiplies rows of that dtype."""
        precision = dot_precision(dtype)
        return {"PRECISION": precision, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability 9.0 as 90; as Hopper's in triton's interpreter, which runs what is tuned."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@functools.cache
def roomy(device: torch.device) -> bool:
    """Whether a program has the shared memory that the kernels are tuned for, as on Hopper: 224 KiB."""
    if device.type != "cuda":  # triton's interpreter
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    enough: bool = properties.shared_memory_per_block_optin >= 224 * 1024
    return enough


def fitting(config: Config, R: int, dtype: torch.dtype, room: bool) -> Config:
    """The configuration, or a narrow one where a large rank leaves few registers, or either little shared memory.

    Args:
        dtype: Of the rows.
        room: See `roomy`. Without it the kernels make do with 99 KiB.
    """
    return config if R <= (64 if room else 16) and dtype.itemsize == 2 else Config(32, 8, 2)


def cdiv(n: int, unit: int) -> int:
    return -(-n // unit)


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


@triton.jit
def multiplied(total):
    """The sums of a `tl.dot` in a loop whose left operand is computed there: of multiplications that are done.

    That operand lies in registers. On Hopper, where multiplications go on while a program does, triton has the next
    round of the loop write over registers that those under way still read: it waits only behind the next
    (`rsDotNeedsWait` in its WGMMAPipeline.cpp). With triton 3.6 numbers came out wrong; what 3.9 assembled of the same
    kernels was free of it. For sums that the loop itself reads it waits at once; to the machine that is nothing.
    """
    if not INTERPRETED:
        total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total
