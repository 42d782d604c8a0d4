"""Gate and activation, forward with h A^T on the way out, backward in place; formulas in float32."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, Config, Factor, factor_tile, fitting, roomy, tile_rows
from .dropout import Kept, enlarged, stored
from .interface import Nonlinearity, padded_rank
from .launch import Form, kernel
from .routing import Route, Tiles

__all__ = ["activate", "activate_backward"]


FORWARD, BACKWARD = Config(128, 8, 2), Config(128, 8, 3)
PROGRAM_ROWS = 32  # at most, so that two programs of the backward share a multiprocessor

# As torch does: a model that has diverged says so.
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    """Four instructions for the fourteen that treat denormal numbers apart; as precise."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


@triton.jit
def _act(x, NAME: tl.constexpr):
    """act(x) and act'(x).

    Callers put a `tl.where` between this and a product: through plain elementwise code triton would move the product's
    layout up to the loads, and compute everything once for the product and once more for the store.
    """
    if NAME == "silu":
        s = _sigmoid(x)
        a = x * s
        return a, s + a * (1 - s)
    if NAME == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if NAME == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    kept = tl.maximum(x, 0.0, propagate_nan=_NAN)
    if NAME == "relu":
        return kept, (x > 0).to(tl.float32)
    return kept * kept, 2 * kept


@triton.jit
def _gate(g, u, alpha, limit, NAME: tl.constexpr):
    """h, dh/dg and dh/du of a gated nonlinearity."""
    if NAME == "clamped":
        inside_g = (g <= limit).to(tl.float32)
        inside_u = ((u >= -limit) & (u <= limit)).to(tl.float32)
        g = tl.minimum(g, limit, propagate_nan=_NAN)
        u = tl.minimum(tl.maximum(u, -limit, propagate_nan=_NAN), limit, propagate_nan=_NAN) + 1
        s = _sigmoid(alpha * g)
        return g * s * u, inside_g * u * s * (1 + alpha * g * (1 - s)), inside_u * g * s
    a, slope = _act(g, NAME)
    return a * u, slope * u, a


@triton.jit
def _load_up(
    row, here, start, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """The gate's and the up projection's tile in float32; twice the same where there is no gate."""
    i = start + tl.arange(0, WIDE)
    mask = here[:, None] & (i[None, :] < I)
    if INTERLEAVED:
        j = 2 * start + tl.arange(0, 2 * WIDE)
        both = tl.load(row + j[None, :], mask=here[:, None] & (j[None, :] < 2 * I), other=0.0)
        g, u = tl.split(tl.reshape(both, [BLOCK, WIDE, 2]))
    else:
        g = tl.load(row + i[None, :], mask=mask, other=0.0)
        if GATED:
            u = tl.load(row + I + i[None, :], mask=mask, other=0.0)
        else:
            u = g
    return g.to(tl.float32), u.to(tl.float32), i, mask


@kernel()
def _activate(
    up, h, low, offs, tiles, I, alpha, limit,
    factor, rank, stride_e, stride_r, stride_d, scaling, words,
    R: tl.constexpr, DROP: tl.constexpr, NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows: h from up, and low = kept h @ factor^T."""
    expert, s, here = tile_rows(tiles, offs, tl.program_id(0), BLOCK, PARTS)
    if expert < 0:
        return
    dtype = h.dtype.element_ty
    up_row = up + s.to(tl.int64)[:, None] * (2 * I if GATED else I)
    h_row = h + s.to(tl.int64)[:, None] * I
    product = tl.zeros([BLOCK, R if R else 1], tl.float32)
    for start in range(0, I, BLOCK_I):
        g, u, i, mask = _load_up(up_row, here, start, I, GATED, INTERLEAVED, BLOCK, BLOCK_I)
        if GATED:
            value, _, _ = _gate(g, u, alpha, limit, NAME)
        else:
            value, _ = _act(g, NAME)
        value = tl.where(mask, value, 0.0).to(dtype)  # see `_act`
        tl.store(h_row + i[None, :], value, mask=mask)
        if R:
            f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, i, I, R, dtype)
            if DROP:
                value = tl.where(stored(words, s, here, start, I, BLOCK, BLOCK_I), value, 0.0)
            product = tl.dot(value, f.trans(), product, input_precision=PRECISION)
    if R:
        at = low + s.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(at, product.to(dtype), mask=here[:, None])


def _parts(tiles: Tiles) -> tuple[int, int]:
    """(rows of a program, programs of a tile)."""
    block = min(tiles.block, PROGRAM_ROWS)
    return block, tiles.block // block


@cache
def _activate_of(
    R: int, drops: bool, name: str, gated: bool, interleaved: bool, block: int, parts: int, config: Config,
    dtype: torch.dtype,
) -> Form:  # fmt: skip
    return _activate.with_constants(
        R=R, DROP=drops, NAME=name, GATED=gated, INTERLEAVED=interleaved, BLOCK=block, PARTS=parts,
        BLOCK_I=config.columns, **config.options(dtype),
    )  # fmt: skip


def activate(
    up: Tensor, nonlinearity: Nonlinearity, route: Route, factor: Factor | None, kept: Kept | None = None
) -> tuple[Tensor, Tensor | None]:
    """The activation of every row, and its product with the expert's factor.

    Args:
        up: "S (2 I)", or "S I" where not gated.
        factor: "E r I", lora_A of the down projection.
        kept: Of h where it meets that.

    Returns:
        h "S I" and kept h @ factor^T "S R" (None without a factor).
    """
    S, I = up.shape[0], up.shape[1] // (2 if nonlinearity.gated else 1)
    h = up.new_empty(S, I)
    R = padded_rank(factor.rank) if factor else 0
    low = up.new_empty(S, R) if factor else None
    tiles, config = route.small, fitting(FORWARD, R, up.dtype, roomy(up.device))
    block, parts = _parts(tiles)
    _activate_of(R, kept is not None, *nonlinearity[:3], block, parts, config, up.dtype)(
        (tiles.limit * parts, 1, 1), up, h, low if factor else h, route.offs, tiles.table, I,
        nonlinearity.alpha, nonlinearity.limit,
        *(enlarged(factor, kept) if factor else (h, 0, 0, 0, 0, 1.0)), h if kept is None else kept.words,
    )  # fmt: skip
    return h, low


@kernel()
def _backward(
    up, dh, low, dweights, dots, weights, order, offs, tiles, I, alpha, limit,
    factor, rank, stride_e, stride_r, stride_d, scaling,
    R: tl.constexpr, DOTS: tl.constexpr, NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    WAIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows: up becomes its own gradient, dh (of an unweighted output) becomes weight * h."""
    expert, s, here = tile_rows(tiles, offs, tl.program_id(0), BLOCK, PARTS)
    if expert < 0:
        return
    dtype = up.dtype.element_ty
    flat = tl.load(order + s, mask=here, other=0)
    weight = tl.load(weights + flat, mask=here, other=0.0).to(tl.float32)
    width = 2 * I if GATED else I
    up_row, dh_row = up + s.to(tl.int64)[:, None] * width, dh + s.to(tl.int64)[:, None] * I
    product = tl.zeros([BLOCK, R if R else 1], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    if DOTS:
        dot += tl.load(dots + s, mask=here, other=0.0)
    for start in range(0, I, BLOCK_I):
        g, u, i, mask = _load_up(up_row, here, start, I, GATED, INTERLEAVED, BLOCK, BLOCK_I)
        gradient = tl.load(dh_row + i[None, :], mask=mask, other=0.0).to(tl.float32)
        if WAIT:  # see `activate_backward`
            tl.debug_barrier()
        if GATED:
            value, dg, du = _gate(g, u, alpha, limit, NAME)
        else:
            value, dg = _act(g, NAME)
            du = dg
        dot += tl.sum(value * gradient, 1)
        gradient *= weight[:, None]
        tl.store(dh_row + i[None, :], (value * weight[:, None]).to(dtype), mask=mask)
        dg = tl.where(mask, dg * gradient, 0.0).to(dtype)  # see `_act`
        at_g = 2 * i if INTERLEAVED else i
        if R:
            f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, at_g, width, R, dtype)
            product = tl.dot(dg, f.trans(), product, input_precision=PRECISION)
        if GATED:
            du = tl.where(mask, du * gradient, 0.0).to(dtype)
            at_u = 2 * i + 1 if INTERLEAVED else I + i
            if R:
                f = factor_tile(factor, rank, stride_e, stride_r, stride_d, scaling, expert, at_u, width, R, dtype)
                product = tl.dot(du, f.trans(), product, input_precision=PRECISION)
            if INTERLEAVED:
                j = 2 * start + tl.arange(0, 2 * BLOCK_I)
                both = tl.reshape(tl.join(dg, du), [BLOCK, 2 * BLOCK_I])
                tl.store(up_row + j[None, :], both, mask=here[:, None] & (j[None, :] < width))
            else:
                tl.store(up_row + i[None, :], dg, mask=mask)
                tl.store(up_row + I + i[None, :], du, mask=mask)
        else:
            tl.store(up_row + i[None, :], dg, mask=mask)
    if R:
        at = low + s.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(at, product.to(dtype), mask=here[:, None])
    tl.store(dweights + flat, dot, mask=here)


@cache
def _backward_of(
    R: int, dots: bool, name: str, gated: bool, interleaved: bool, waits: bool, block: int, parts: int, config: Config,
    dtype: torch.dtype,
) -> Form:  # fmt: skip
    return _backward.with_constants(
        R=R, DOTS=dots, NAME=name, GATED=gated, INTERLEAVED=interleaved, WAIT=waits, BLOCK=block, PARTS=parts,
        BLOCK_I=config.columns, **config.options(dtype),
    )  # fmt: skip


def activate_backward(
    up: Tensor,
    dh: Tensor,
    nonlinearity: Nonlinearity,
    route: Route,
    weights: Tensor,
    factor: Factor | None,
    dots: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The activation's backward, in place.

    Rows of whole 32 bytes are read and written with one layout, so that every element belongs to one thread, or come
    through shared memory. Others may be written by another thread than the one that reads them, which then has to wait;
    a barrier in the loop keeps triton from loading ahead.

    Args:
        up: "S (2 I)", overwritten with the gradient of itself.
        dh: "S I", the gradient of h for an output that is not weighted; overwritten with weight * h.
        weights: "T k", the routing weights.
        factor: "E r (2 I)", lora_B of the up projection, transposed.
        dots: "S" float32, what the router's gradient has beside <h, dh>.

    Returns:
        d up @ factor^T "S R" (None without a factor), and the gradient of the routing weights, "T k" float32.
    """
    S, I = dh.shape
    R = padded_rank(factor.rank) if factor else 0
    low = up.new_empty(S, R) if factor else None
    dweights = torch.zeros(weights.shape, dtype=torch.float32, device=up.device)  # zero where no expert here computes
    tiles, config = route.small, fitting(BACKWARD, R, up.dtype, roomy(up.device))
    block, parts = _parts(tiles)
    _backward_of(R, dots is not None, *nonlinearity[:3], I % 16 != 0, block, parts, config, up.dtype)(
        (tiles.limit * parts, 1, 1), up, dh, low if factor else up, dweights,
        dots if dots is not None else dweights, weights, route.order, route.offs, tiles.table, I,
        nonlinearity.alpha, nonlinearity.limit,
        *(factor or (up, 0, 0, 0, 0, 1.0)),
    )  # fmt: skip
    return low, dweights
