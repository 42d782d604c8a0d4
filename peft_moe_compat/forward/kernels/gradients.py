"""Gradients of the LoRA factors: per expert, low^T @ rows, in the factor's own strides."""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from .common import Config, Factor, cdiv, fitting, roomy
from .dropout import Kept, enlarged, stored
from .factors import apart, unpacked, wants_packing
from .launch import Form, kernel
from .routing import Route

__all__ = ["factor_gradient"]


GRADIENT = Config(64, 4, 3)


@kernel()
def _factor_gradient(
    low, rows, order, weights, offs, D, k,
    grad, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, DROP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One expert and BLOCK_D features: the sum over the expert's rows, in their order."""
    expert = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, R)
    begin = tl.load(offs + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offs + expert)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        here = s < end
        u = tl.load(low + s.to(tl.int64)[:, None] * R + r[None, :], mask=here[:, None], other=0.0)
        row = s
        if GATHER or WEIGHTED:
            flat = tl.load(order + s, mask=here, other=0)
            if WEIGHTED:
                w = tl.load(weights + flat, mask=here, other=0.0).to(tl.float32)
                u = (u.to(tl.float32) * w[:, None]).to(low.dtype.element_ty)
            if GATHER:
                row = flat // k
        at = rows + row.to(tl.int64)[:, None] * D + d[None, :]
        x = tl.load(at, mask=here[:, None] & (d[None, :] < D), other=0.0).to(low.dtype.element_ty)
        if DROP:
            x = tl.where(stored(words, s, here, tl.program_id(0) * BLOCK_D, D, BLOCK, BLOCK_D), x, 0.0)
        total = tl.dot(u.trans(), x, total, input_precision=PRECISION)
    at = grad + expert.to(tl.int64) * stride_e + r[:, None].to(tl.int64) * stride_r + d[None, :].to(tl.int64) * stride_d
    tl.store(at, (total * scaling).to(grad.dtype.element_ty), mask=(r[:, None] < rank) & (d[None, :] < D))


@cache
def _gradient_of(
    R: int, gathers: bool, weighted: bool, drops: bool, block: int, config: Config, dtype: torch.dtype
) -> Form:  # fmt: skip
    return _factor_gradient.with_constants(
        R=R, GATHER=gathers, WEIGHTED=weighted, DROP=drops, BLOCK=block, BLOCK_D=config.columns, **config.options(dtype)
    )


def factor_gradient(
    low: Tensor | None,
    rows: Tensor,
    route: Route,
    factor: Factor | None,
    *,
    gather_k: int | None = None,
    weights: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor | None:
    """scaling * sum over an expert's rows of low^T rows, as the factor's tensor is.

    Args:
        low: "S R".
        rows: "S d" in the order of the experts, or, with `gather_k`, "T d".
        factor: What the gradient is of, and the scaling to multiply by; None where nobody wants it.
        gather_k: k, where each row is to be gathered from its token.
        weights: "T k", multiplied to the rows of `low` where given.
        kept: Of `rows`, as they met the factor.
    """
    if factor is None or low is None:
        return None
    D, R, E = rows.shape[1], low.shape[1], route.offs.shape[0]
    packs = wants_packing(factor, E, low.shape[0])
    if packs:
        grad = apart(factor, E, D, factor.tensor.dtype, factor.scaling)
    else:
        grad = factor._replace(tensor=torch.empty_like(factor.tensor))
    config = fitting(GRADIENT, R, low.dtype, roomy(low.device))
    gathers, weighted = gather_k is not None, weights is not None
    _gradient_of(R, gathers, weighted, kept is not None, route.large.block, config, low.dtype)(
        (cdiv(D, config.columns), E, 1), low, rows.contiguous(), route.order,
        weights if weights is not None else low, route.offs, D, gather_k or 1,
        *enlarged(grad, kept), low if kept is None else kept.words,
    )  # fmt: skip
    return unpacked(grad, factor, E, D) if packs else grad.tensor
