"""Dropout of the rows that meet lora_A, which keeps a seed and no mask.

A row's mask is of the seed and of which row of the whole batch it is, wherever it is computed and in whatever order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dropped", "kept"]


def kept(rows: Tensor, p: float | Tensor, seed: int, places: Tensor) -> Tensor:
    """What each element of rows "S in" is multiplied by: 0 with probability p ("S 1": its row's), else 1 / (1 - p).

    Four neighbours are the 16-bit words of one hash, of their row's key and their columns': p is rounded to 2**-16.

    Args:
        places: "S" int64, which row of the whole batch each is.
    """
    columns = torch.arange(-(-rows.shape[1] // 4), device=rows.device)
    bits = _mixed(places, seed).unsqueeze(1) ^ _mixed(columns, ~seed)
    bits ^= bits >> 32
    bits *= _MULTIPLIERS[0]
    bits ^= (bits >> 32).bitwise_and_(2**32 - 1)
    words = bits.reshape(-1).view(torch.int16).reshape(len(places), 4 * len(columns))[:, : rows.shape[1]]
    if isinstance(p, Tensor):
        drops = (p * 2**16).round()
        share = 1 - drops / 2**16
        return (words >= drops.int() - 2**15).to(rows.dtype).div_(share.masked_fill(share == 0, 1))
    drop = round(p * 2**16)
    if drop == 2**16:
        return torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    return (words >= drop - 2**15).to(rows.dtype).div_(1 - drop / 2**16)


_MULTIPLIERS = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mixed(counters: Tensor, seed: int) -> Tensor:
    """Those numbers of the generator SplitMix64 (Steele et al. 2014) with a seed, int64."""
    bits = counters * -0x61C8864680B583EB + seed
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = (bits ^ (bits >> shift) & 2 ** (64 - shift) - 1) * multiplier
    return bits ^ (bits >> 31) & 2**33 - 1


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, p: float | Tensor, seed: int, places: Tensor) -> Tensor:
        ctx.how = p, seed
        ctx.save_for_backward(places)
        return rows * kept(rows, p, seed, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * kept(gradient, *ctx.how, *ctx.saved_tensors), None, None, None


def dropped(rows: Tensor, p: float | Tensor, places: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.dropout(rows, p)`, with nothing kept for the backward but a seed.

    p may be "S 1", each row's own.

    The seed is drawn from torch's generator of the CPU, which gradient checkpointing rewinds and no device waits for.

    Args:
        places: "S" int64, which row of the whole batch each is; one after the other without.
    """
    if not isinstance(p, Tensor) and p == 0:
        return rows
    if torch.compiler.is_compiling() and not isinstance(p, Tensor):
        return torch.nn.functional.dropout(rows, p)  # compiled graphs have a generator of their own
    seed = int(torch.randint(2**63 - 1, ()))
    if places is None:
        places = torch.arange(rows.shape[0], device=rows.device)
    out: Tensor = _Dropout.apply(rows, p, seed, places)  # type: ignore[no-untyped-call]
    return out
