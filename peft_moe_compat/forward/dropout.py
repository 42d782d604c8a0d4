"""Dropout of the rows that meet lora_A, which keeps a seed and no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dropped", "kept"]


def kept(rows: Tensor, p: float, seed: int) -> Tensor:
    """What each element of rows "S in" is multiplied by: 0 with probability p, else 1 / (1 - p)."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    mask = torch.empty_like(rows).bernoulli_(1 - p, generator=generator)
    return mask.div_(1 - p) if p < 1 else mask


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, p: float, seed: int) -> Tensor:
        ctx.how = p, seed
        return rows * kept(rows, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * kept(gradient, *ctx.how), None, None


def dropped(rows: Tensor, p: float) -> Tensor:
    """As `torch.nn.functional.dropout(rows, p)`, with nothing kept for the backward but a seed.

    The seed is drawn from torch's generator of the CPU, which gradient checkpointing rewinds and no device waits for.
    """
    if p == 0:
        return rows
    if torch.compiler.is_compiling():
        return torch.nn.functional.dropout(rows, p)  # compiled graphs have a generator of their own
    seed = int(torch.randint(2**63 - 1, ()))
    out: Tensor = _Dropout.apply(rows, p, seed)  # type: ignore[no-untyped-call]
    return out
