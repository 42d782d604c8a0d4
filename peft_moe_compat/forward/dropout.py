"""Dropout of the rows that meet lora_A, which keeps a seed and no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dropped", "kept"]


def kept(rows: Tensor, p: float | Tensor, seed: int) -> Tensor:
    """What each element of rows "S in" is multiplied by: 0 with probability p ("S 1": its row's), else 1 / (1 - p)."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    mask = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)  # not as rows is strided: gradients are not
    if isinstance(p, Tensor):
        share = (1 - p).to(rows.dtype)
        return mask.bernoulli_(share.expand(rows.shape), generator=generator).div_(share.masked_fill(share == 0, 1))
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p if p < 1 else 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, p: float | Tensor, seed: int) -> Tensor:
        ctx.how = p, seed
        return rows * kept(rows, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * kept(gradient, *ctx.how), None, None


def dropped(rows: Tensor, p: float | Tensor) -> Tensor:
    """As `torch.nn.functional.dropout(rows, p)`, with nothing kept for the backward but a seed.

    p may be "S 1", each row's own.

    The seed is drawn from torch's generator of the CPU, which gradient checkpointing rewinds and no device waits for.
    """
    if not isinstance(p, Tensor) and p == 0:
        return rows
    if torch.compiler.is_compiling() and not isinstance(p, Tensor):
        return torch.nn.functional.dropout(rows, p)  # compiled graphs have a generator of their own
    seed = int(torch.randint(2**63 - 1, ()))
    out: Tensor = _Dropout.apply(rows, p, seed)  # type: ignore[no-untyped-call]
    return out
