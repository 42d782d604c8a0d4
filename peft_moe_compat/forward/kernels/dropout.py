"""Which elements of the rows that meet lora_A are kept: from a counter, so that all a forward leaves is a seed.

Drawn ahead of the kernels that read it, as a bit for each: a sixteenth of the rows, which no forward leaves either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import ExpertLora, FlatLora
from .common import Factor, cdiv
from .launch import kernel
from .routing import Route

__all__ = ["Drop", "Kept", "drawn", "enlarged", "kept_of", "stored"]


class Drop(NamedTuple):
    """The dropout of one forward.

    Attributes:
        seed: () int64 on the device of the rows.
        p: The probability.
    """

    seed: Tensor
    p: float


class Kept(NamedTuple):
    """What it has kept of rows.

    Attributes:
        words: "S (in / 32)" int32, rounded up: a bit for each element, of the first column the lowest one.
        p: The probability.
    """

    words: Tensor
    p: float


def drawn(lora: ExpertLora | FlatLora | None, device: torch.device) -> Drop | None:
    """That of an update all of whose ranks share a mask; the seed is from torch's generator of the device."""
    if lora is None or not lora.dropout:
        return None
    ((_, p),) = lora.dropout
    return Drop(torch.randint(2**63 - 1, (), device=device), p)


def enlarged(factor: Factor, kept: Kept | None) -> Factor:
    """A factor for rows whose kept elements are to be multiplied by 1 / (1 - p)."""
    return factor if kept is None or kept.p >= 1 else factor._replace(scaling=factor.scaling / (1 - kept.p))


@triton.jit
def _philox(low, high, key):
    """Philox4x32-7 of the counter (low, high, 0, 0): four words, each product one instruction.

    Seven rounds pass what the usual ten do (Salmon et al. 2011).
    """
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    a, b = low.to(tl.uint32), high.to(tl.uint32)
    c, d = a * 0, b * 0
    for _ in tl.static_range(7):
        from_a, from_c = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (from_c >> 32).to(tl.uint32) ^ b ^ k0, (from_a >> 32).to(tl.uint32) ^ d ^ k1
        b, d = from_c.to(tl.uint32), from_a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return a, b, c, d


@triton.jit
def _digit(word, random, digits, i: tl.constexpr):
    """Bits set with probability q -> (q + the i-th binary digit of `digits`) / 2."""
    one = ((digits >> i) & 1).to(tl.uint32) * 0xFFFFFFFF
    return (word & random) | (one & (word | random))


@triton.jit
def _digits(word, a, b, c, d, digits, i: tl.constexpr):
    """Four digits, from the i-th on."""
    word = _digit(_digit(word, a, digits, i), b, digits, i + 1)
    return _digit(_digit(word, c, digits, i + 2), d, digits, i + 3)


@triton.jit
def _turned(random):
    return random << 13 | random >> 19


ROWS, COLUMNS = 64, 8  # of words, of a program


@kernel("S", "across", "digits")
def _draw(words, places, seed, S, across, digits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Words whose bits are set with a probability of `digits` / 65536: a random bit for each binary digit.

    The lower eight digits, which decide one time in 256, take bits of other elements: that much two of them correlate.
    """
    s, w = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (s < S)[:, None] & (w < across)[None, :]
    zero = (s * 0)[:, None] + (w * 0)[None, :]
    place, column = tl.load(places + s, mask=s < S, other=0)[:, None] + zero, w[None, :] + zero
    key = tl.load(seed).to(tl.uint64)
    a, b, c, d = _philox(place, 2 * column, key)
    e, f, g, h = _philox(place, 2 * column + 1, key)
    word = _digits(zero.to(tl.uint32), _turned(a), _turned(b), _turned(c), _turned(d), digits, 0)
    word = _digits(word, _turned(e), _turned(f), _turned(g), _turned(h), digits, 4)
    word = _digits(_digits(word, a, b, c, d, digits, 8), e, f, g, h, digits, 12)
    tl.store(words + s.to(tl.int64)[:, None] * across + column, word.to(tl.int32, bitcast=True), mask=here)


def kept_of(drop: Drop | None, route: Route, D: int) -> Kept | None:
    """What a dropout keeps of rows "S D", by which row of the whole batch each is; None without one."""
    if drop is None:
        return None
    S, across = route.rows, cdiv(D, 32)
    words = torch.empty((S, across), dtype=torch.int32, device=drop.seed.device)
    _draw(
        (cdiv(S, ROWS), cdiv(across, COLUMNS), 1), words, route.order if route.places is None else route.places,
        drop.seed, S, across, min(round((1 - drop.p) * 65536), 65535), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return Kept(words, drop.p)


@triton.jit
def stored(words, s, here, start, D, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Which elements are kept of rows `s` and of WIDE columns from `start`, a multiple of 32, of D."""
    g, across = start // 32 + tl.arange(0, WIDE // 32), (D + 31) // 32
    at = words + s.to(tl.int64)[:, None] * across + g[None, :]
    found = tl.load(at, mask=here[:, None] & (g[None, :] < across), other=0)
    each = found[:, :, None] >> tl.arange(0, 32)[None, None, :]
    return tl.reshape(each & 1, [BLOCK, WIDE]) != 0
