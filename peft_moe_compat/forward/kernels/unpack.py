"""From packed bytes to weights, bit for bit what the format's own dequantisation gives. See `model.packed`.

A kernel is compiled for a `CODEC`: the fields of `model.packed.Codec`, then rows and columns of an expert as stored,
whether these rows are in-features, and whether the device converts float8, as from compute capability 8.9 on (what
triton's interpreter makes of its NaN is a number).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model.packed import CODES, FLOAT8, PackedWeight
from .common import INTERPRETED, capability_of, cdiv
from .launch import Repeated, kernel
from .permute import looked_up

__all__ = [
    "Unpacking",
    "codec_of",
    "numbers",
    "packed_arguments",
    "scaled",
    "scales_of",
    "span_of",
    "unpack",
    "weight_tile",
]

UNPACKED = 4096  # bytes that a program decodes


@triton.jit
def scales_of(scales, zero_points, scale_table, scale_scales, scale_offset, expert, r, c, mask, CODEC: tl.constexpr):
    """(scales, zero points) of the weights at rows r and columns c of one expert, float32."""
    HEIGHT: tl.constexpr = CODEC[2]
    WIDTH: tl.constexpr = CODEC[3]
    ROWS: tl.constexpr = CODEC[8]
    COLUMNS: tl.constexpr = CODEC[9]
    if HEIGHT:
        ACROSS: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
        first = expert.to(tl.int64) * ((ROWS + HEIGHT - 1) // HEIGHT * ACROSS)
        i = (r // HEIGHT) * ACROSS + c // WIDTH
    else:
        first = expert.to(tl.int64) * (ROWS * COLUMNS // WIDTH)
        i = (r * COLUMNS + c) // WIDTH
    found = tl.load(scales + first + i, mask=mask, other=0)
    if CODEC[6]:  # nested
        outer = tl.load(scale_scales + (first + i) // CODEC[6], mask=mask, other=0.0)
        found = tl.load(scale_table + found.to(tl.int32)) * outer + tl.load(scale_offset)
    elif CODEC[4]:  # exponents, of which 0 makes a number below float32's normal ones
        power = found.to(tl.int32)
        found = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)
    zero = 0.0
    if CODEC[5]:
        zero = tl.load(zero_points + first + i, mask=mask, other=0).to(tl.float32)
    return found.to(tl.float32), zero


@triton.jit
def _e2m1(code):
    """The number of a code of `model.packed.E2M1`, whose bits are those of a float32 below its normal ones."""
    bits = (code & 8) << 28 | (code & 7) << 22
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def numbers(byte, table, CODEC: tl.constexpr):
    """(first, second) numbers of a byte as float32; the same twice where it holds one."""
    if CODEC[0] == 0:
        if CODEC[4]:
            high, low = _e2m1((byte >> 4).to(tl.int32)), _e2m1((byte & 15).to(tl.int32))
        else:
            high, low = looked_up(byte, table)
        if CODEC[1]:
            first, second = high, low
        else:
            first, second = low, high
    elif CODEC[0] == 1:
        first = byte.to(tl.int8, bitcast=True).to(tl.float32)
        second = first
    elif CODEC[11]:
        first = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        second = first
    else:  # float8 e4m3fn by its bits, which every device and the interpreter can
        bits = byte.to(tl.int32)
        size = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
        size = tl.where((bits & 127) == 127, float("nan"), size)
        first = tl.where(bits >= 128, -size, size)
        second = first
    return first, second


@triton.jit
def scaled(number, zero, scale, dtype: tl.constexpr, CODEC: tl.constexpr):
    """Multiplied in float32, in the format's order, and rounded once."""
    if CODEC[5]:
        number -= zero
    value = number * scale
    if CODEC[7] != 1:
        value *= 1.0 / CODEC[7]
    return value.to(dtype)


@triton.jit
def _decoded(
    data, scales, table, zero_points, scale_table, scale_scales, scale_offset, expert, r, c, mask,
    dtype: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The weights of spans, along a new last axis, or two where a byte holds two.

    A span is SPAN bytes of a row r from column c on, with one scale.
    """
    PER: tl.constexpr = 2 if CODEC[0] == 0 else 1
    scale, zero = scales_of(scales, zero_points, scale_table, scale_scales, scale_offset, expert, r, c, mask, CODEC)
    base = data + expert.to(tl.int64) * (CODEC[8] * CODEC[9] // PER) + r * (CODEC[9] // PER) + c // PER
    byte = tl.load(tl.expand_dims(base, -1) + tl.arange(0, SPAN), mask=tl.expand_dims(mask, -1), other=0)
    scale = tl.expand_dims(scale, -1)
    if CODEC[5]:
        zero = tl.expand_dims(zero, -1)
    first, second = numbers(byte, table, CODEC)
    value = scaled(first, zero, scale, dtype, CODEC)
    if PER == 2:
        value = tl.join(value, scaled(second, zero, scale, dtype, CODEC))
    return value


@triton.jit
def weight_tile(
    data, scales, table, zero_points, scale_table, scale_scales, scale_offset, expert, r, first_column,
    dtype: tl.constexpr, CODEC: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS weights from a column on, of each of the rows `r` of one expert as stored; small where there are none."""
    PER: tl.constexpr = 2 if CODEC[0] == 0 else 1
    r = r[:, None]
    c = first_column + PER * SPAN * tl.arange(0, COLUMNS // (PER * SPAN))[None, :]
    r, c = tl.broadcast(r, c)
    value = _decoded(
        data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
        expert, r, c, (r < CODEC[8]) & (c < CODEC[9]), dtype, CODEC, SPAN,
    )  # fmt: skip
    return value.reshape(r.shape[0], COLUMNS)


@kernel("first_expert", "first_row", "first_column", fuse=False)
def _unpack(
    out, offs, first_expert, first_row, first_column,
    data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
    CODEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Some spans of a rectangle of one expert, if rows are routed to it; its rows follow each other without a gap.

    Nothing is fused, which would round differently from the formats' own.
    """
    PER: tl.constexpr = 2 if CODEC[0] == 0 else 1
    ACROSS: tl.constexpr = COLUMNS // (PER * SPAN)
    place = tl.program_id(1)
    expert = first_expert + place
    begin = tl.load(offs + expert - 1, mask=expert > 0, other=0)
    if begin == tl.load(offs + expert):
        return
    i = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    r, c = first_row + i // ACROSS, first_column + i % ACROSS * (PER * SPAN)
    mask = i < ROWS * ACROSS
    value = _decoded(
        data, scales, table, zero_points, scale_table, scale_scales, scale_offset,
        expert, r, c, mask, out.dtype.element_ty, CODEC, SPAN,
    )  # fmt: skip
    to = out + place.to(tl.int64) * (ROWS * COLUMNS) + i[:, None] * (PER * SPAN) + tl.arange(0, PER * SPAN)[None, :]
    tl.store(to, value.reshape(SPANS, PER * SPAN), mask=mask[:, None])


def codec_of(weight: PackedWeight) -> tuple[Any, ...]:
    """What a kernel is compiled for; numbers alone, which triton hashes."""
    converts = weight.codec.kind == FLOAT8 and capability_of(weight.device) >= 89 and not INTERPRETED.value
    numbers = *weight.codec, *weight.stored[1:], weight.rows_are_in, converts
    return tuple(int(n) if isinstance(n, bool) else n for n in numbers)


def packed_arguments(weight: PackedWeight) -> tuple[Tensor, ...]:
    """The bytes and what else they are decoded by, scales standing in for what a format has not."""
    data, scales, *others = weight[4:]
    return data.view(torch.uint8), scales, *(scales if other is None else other for other in others)


def span_of(weight: PackedWeight, columns: int) -> int:
    """Bytes of a row that share a scale, a power of two: in tiles of that many columns."""
    per = 2 if weight.codec.kind == CODES else 1
    common = math.gcd(weight.codec.width // per, weight.stored[2] // per, columns // per)
    return min(common & -common, 64)


class Unpacking:
    """Decodes rectangles of some experts, as stored, into `out` "experts rows columns"; see `unpack`."""

    def __init__(self, weight: PackedWeight, offs: Tensor, out: Tensor) -> None:
        count, height, width = out.shape
        span, bytes_ = span_of(weight, width), height * width // (2 if weight.codec.kind == CODES else 1)
        self._out, self._offs, self._packed = out, offs, packed_arguments(weight)
        self._launch = Repeated(
            _unpack, (cdiv(bytes_, UNPACKED), count, 1),
            CODEC=codec_of(weight), ROWS=height, COLUMNS=width, SPAN=span, SPANS=UNPACKED // span, num_warps=4,
        )  # fmt: skip

    def __call__(self, first_expert: int, first_row: int, first_column: int) -> None:
        self._launch(self._out, self._offs, first_expert, first_row, first_column, *self._packed)


def unpack(
    weight: PackedWeight, offs: Tensor, experts: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """A rectangle of some experts, as stored: "experts rows columns". Undefined for experts without routed rows.

    Args:
        offs: "E", where each expert's routed rows end.
        experts, rows, columns: First and end.
    """
    count, height, width = (end - first for first, end in (experts, rows, columns))
    out = torch.empty(count, height, width, dtype=weight.dtype, device=weight.device)
    Unpacking(weight, offs, out)(experts[0], rows[0], columns[0])
    return out
