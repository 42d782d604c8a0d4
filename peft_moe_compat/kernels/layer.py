"""The experts layer as one autograd function.

Kept for the backward: the hidden states and routing of the tokens, the up projection's output, and the two "S R"
products with lora_A. Never the gathered rows, the activation or the down projection's output: the router's gradient
<down, d out> is <h, dh>, where dh is the gradient of h for an output that is not weighted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fused import Activation
from . import activation, unfused
from .common import Factor
from .decode import MOST_ROWS, few_rows
from .factors import packed
from .gemm import grouped_linear
from .gradients import factor_gradient
from .routing import Route, Tiles, route
from .rows import combine, gather

__all__ = ["Layer", "fused_experts"]


class Layer(NamedTuple):
    """What of an experts layer gets no gradient and is no tensor, and which tensors are there at all.

    Attributes:
        activation: A fused one, or the module's own function of the up projection's rows.
        up_scaling, down_scaling: Of the LoRA on each.
    """

    activation: Activation | Callable[[Tensor], Tensor]
    up_scaling: float = 1.0
    down_scaling: float = 1.0

    @property
    def kernels(self) -> Any:
        return activation if isinstance(self.activation, Activation) else unfused


class Weights(NamedTuple):
    """The frozen base: "E in out" views and biases "E out"."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Loras(NamedTuple):
    """lora_A "E r in" and lora_B "E out r" of the two projections; None where a projection has none."""

    up_A: Tensor | None
    up_B: Tensor | None
    down_A: Tensor | None
    down_B: Tensor | None

    def factors(self, layer: Layer) -> tuple[Factor | None, ...]:
        """All four as "E r d"."""
        return (
            None if self.up_A is None else Factor(self.up_A),
            None if self.up_B is None else Factor(self.up_B.transpose(1, 2), layer.up_scaling),
            None if self.down_A is None else Factor(self.down_A),
            None if self.down_B is None else Factor(self.down_B.transpose(1, 2), layer.down_scaling),
        )


def _tile_sizes(S: int, E: int) -> tuple[int, int]:
    """Rows of a tile for the kernels bound by memory and for the products, by the rows an expert gets on average."""
    rows = S // E
    if rows >= 64:
        return 64, 128
    return (32, 64) if rows >= 16 else (16, 16)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layer, hidden: Tensor, index: Tensor, weights: Tensor, base: int, *tensors: Tensor | None
    ) -> Tensor:
        W, loras = Weights(*tensors[:base]), Loras(*tensors[base:])  # type: ignore[arg-type]
        (T, k), dtype = index.shape, W.up.dtype
        where = route(index, W.up.shape[0], *_tile_sizes(T * k, W.up.shape[0]))
        up_A, up_B, down_A, down_B = loras.factors(layer)
        x, low_up, _ = gather(hidden, where, k, dtype, up_A)
        up_B = packed(up_B, dtype, T * k)  # after the gather, which keeps the device busy meanwhile
        up = grouped_linear(x, W.up, where, low_up, up_B, W.up_bias)
        del x
        h, low_down = layer.kernels.activate(up, layer.activation, where, down_A)
        down_B = packed(down_B, dtype, T * k)
        down = grouped_linear(h, W.down, where, low_down, down_B, W.down_bias)
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.k, ctx.spent = layer, k, False
            ctx.tiles = [(tiles.limit, tiles.block) for tiles in (where.small, where.large)]
            factors = up_A, up_B, down_A, down_B
            ctx.scalings = [factor and factor.scaling for factor in factors]
            routing = where.order, where.position, where.offs, where.small.table, where.large.table
            kept = [factor and factor.tensor for factor in factors]
            ctx.save_for_backward(hidden, weights, up, low_up, low_down, *routing, *kept, *tensors)
        return combine(down, where, weights, k, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        hidden, weights, up, low_up, low_down, order, position, offs, small, large, *rest = ctx.saved_tensors
        tiles = [Tiles(table, *size) for table, size in zip((small, large), ctx.tiles, strict=True)]
        where = Route(order, position, offs, tiles[0], tiles[1], weights.numel())
        up_A, up_B, down_A, down_B = (
            None if t is None else Factor(t, s) for t, s in zip(rest, ctx.scalings, strict=False)
        )
        W, loras = Weights(*rest[4:8]), Loras(*rest[8:])
        layer, k, dtype = ctx.layer, ctx.k, W.up.dtype
        if ctx.spent:  # a backward before this one has turned `up` into its gradient
            x, _, _ = gather(hidden, where, k, dtype, None)
            up = grouped_linear(x, W.up, where, low_up, up_B, W.up_bias)
            del x
        ctx.spent = True

        dout = dout.contiguous()
        g, low_g, dots = gather(dout, where, k, dtype, down_B, W.down_bias)
        dh = grouped_linear(g, W.down.transpose(1, 2), where, low_g, down_A)
        del g
        low_y, dweights = layer.kernels.activate_backward(up, dh, layer.activation, where, weights, up_B, dots)
        dup, weighted_h = up, dh
        wanted = [
            f if needed else None for f, needed in zip(loras.factors(layer), ctx.needs_input_grad[-4:], strict=True)
        ]
        d_down_A = factor_gradient(low_g, weighted_h, where, wanted[2])
        d_down_B = factor_gradient(low_down, dout, where, wanted[3], gather_k=k, weights=weights)
        del weighted_h, dh
        d_up_A = factor_gradient(low_y, hidden, where, wanted[0], gather_k=k)
        d_up_B = factor_gradient(low_up, dup, where, wanted[1])
        dhidden = None
        if ctx.needs_input_grad[1]:
            dx = grouped_linear(dup, W.up.transpose(1, 2), where, low_y, up_A)
            dhidden = combine(dx, where, None, k, hidden.dtype)
        d_up_B, d_down_B = (None if d is None else d.transpose(1, 2) for d in (d_up_B, d_down_B))
        gradients = d_up_A, d_up_B, d_down_A, d_down_B
        return None, dhidden, None, dweights.to(weights.dtype), None, *[None] * len(W), *gradients


def fused_experts(
    layer: Layer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Weights, loras: Loras
) -> Tensor:
    """Routed experts with LoRA, forward and backward in fused kernels.

    Args:
        layer: Activation and scalings.
        hidden: "T H".
        top_k_index, top_k_weights: "T k"; ids outside 0..E-1 contribute nothing.
        weights, loras: See there. The base weights must need no gradient.

    Returns:
        "T H" in the dtype of `hidden`.
    """
    hidden, top_k_weights = hidden.contiguous(), top_k_weights.contiguous()
    inputs = [hidden, top_k_weights, *loras]
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not trained and top_k_index.numel() <= MOST_ROWS and isinstance(layer.activation, Activation):
        index = top_k_index.contiguous()
        return few_rows(layer.activation, hidden, index, top_k_weights, weights, loras.factors(layer))
    out: Tensor = _FusedExperts.apply(layer, hidden, top_k_index, top_k_weights, len(weights), *weights, *loras)
    return out
