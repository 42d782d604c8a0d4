"""Products with quantised base weights: dequantised where they are used, and never kept for the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..model.weights import read, stored_format
from .grouped_mm import Gather, grouped_mm, multiply

__all__ = ["grouped_mm_of"]


class _FrozenGroupedMM(torch.autograd.Function):
    """`grouped_mm` of a weight that is read again for the backward, instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, read_again: Any) -> Tensor:
        ctx.save_for_backward(offs)
        ctx.read_again = read_again
        return multiply(x, weight, offs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (offs,) = ctx.saved_tensors
        return multiply(dy, ctx.read_again().transpose(1, 2), offs), None, None, None


def _oriented(module: nn.Module, name: str, dtype: torch.dtype, transposed: bool) -> Tensor:
    """ "E in out"."""
    weight = read(module, name, dtype)
    return weight if transposed else weight.transpose(1, 2)


def _stays(module: Any) -> bool:
    """Whether the weights will still be there in the backward: accelerate's offloading takes them away until then."""
    return not getattr(getattr(module, "_hf_hook", None), "offload", False)


def grouped_mm_of(
    x: Tensor, weight: Tensor, offs: Tensor, gather: Gather | None, module: nn.Module, name: str, transposed: bool
) -> Tensor:
    """`grouped_mm(x, weight, offs, gather)`, keeping no copy of a frozen quantised weight for the backward.

    Args:
        x: "S in", rows sorted by group.
        weight: "E in out", what was read of the parameter.
        offs: "E", int32, where each group ends.
        gather: See `grouped_mm`; for compiled graphs.
        module: Holds the parameter.
        name: Of the parameter.
        transposed: Whether the parameter is stored "E in out" rather than "E out in".

    Returns:
        "S out" in the dtype of `weight`.
    """
    if weight.requires_grad or not stored_format(module, name) or not _stays(module):
        return grouped_mm(x, weight, offs, gather)
    dtype = weight.dtype
    out: Tensor
    if torch.compiler.is_compiling():
        # Both reads would be one node of the graph, and its result kept; a checkpointed region is computed again.
        def region(x: Tensor) -> Tensor:
            return grouped_mm(x, _oriented(module, name, dtype, transposed), offs, gather)

        out = checkpoint(region, x, use_reentrant=False, preserve_rng_state=False)
    else:
        read_again = partial(_oriented, module, name, dtype, transposed)
        out = _FrozenGroupedMM.apply(x.to(dtype), weight, offs, read_again)  # type: ignore[no-untyped-call]
    return out
