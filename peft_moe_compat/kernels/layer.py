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

__all__ = [
    "Layer",
    "Loras",
    "Passed",
    "Weights",
    "backward_pass",
    "forward_pass",
    "fused_experts",
    "routing",
]


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
    return (64, 64) if rows >= 16 else (16, 16)


class Passed(NamedTuple):
    """What a forward leaves for its backward.

    Attributes:
        up: "S (2 I)" or "S I", the up projection's output; `backward_pass` overwrites it.
        low_up, low_down: "S R", the products with the two lora_A; None where there is none.
    """

    up: Tensor
    low_up: Tensor | None
    low_down: Tensor | None


def routing(index: Tensor, W: Weights) -> Route:
    """The routed rows sorted by the experts of `W`, for `forward_pass` and `backward_pass`."""
    return route(index, W.up.shape[0], *_tile_sizes(index.numel(), W.up.shape[0]))


def forward_pass(
    layer: Layer, hidden: Tensor, weights: Tensor, where: Route, W: Weights, loras: Loras
) -> tuple[Tensor, Passed, tuple[Factor | None, ...]]:
    """(output "T H", what the backward needs, the factors with each lora_B packed)."""
    k, S, dtype = weights.shape[1], where.rows, W.up.dtype
    up_A, up_B, down_A, down_B = loras.factors(layer)
    x, low_up, _ = gather(hidden, where, k, dtype, up_A)
    up_B = packed(up_B, dtype, S)  # after the gather, which keeps the device busy meanwhile
    up = grouped_linear(x, W.up, where, low_up, up_B, W.up_bias)
    del x
    h, low_down = layer.kernels.activate(up, layer.activation, where, down_A)
    down_B = packed(down_B, dtype, S)
    down = grouped_linear(h, W.down, where, low_down, down_B, W.down_bias)
    out = combine(down, where, weights, k, hidden.dtype)
    return out, Passed(up, low_up, low_down), (up_A, up_B, down_A, down_B)


def backward_pass(
    layer: Layer,
    dout: Tensor,
    hidden: Tensor,
    weights: Tensor,
    where: Route,
    passed: Passed,
    factors: tuple[Factor | None, ...],
    W: Weights,
    wanted: tuple[Factor | None, ...],
    wants_hidden: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states, the routing weights, and the four factors of `wanted`, each None where unwanted.

    Args:
        factors: As the forward used them.
        wanted: As `Loras.factors` gives them; None where no gradient is.
    """
    up_A, up_B, down_A, down_B = factors
    k, dout = weights.shape[1], dout.contiguous()
    g, low_g, dots = gather(dout, where, k, W.up.dtype, down_B, W.down_bias)
    dh = grouped_linear(g, W.down.transpose(1, 2), where, low_g, down_A)
    del g
    low_y, dweights = layer.kernels.activate_backward(passed.up, dh, layer.activation, where, weights, up_B, dots)
    dup, weighted_h = passed.up, dh
    d_down_A = factor_gradient(low_g, weighted_h, where, wanted[2])
    d_down_B = factor_gradient(passed.low_down, dout, where, wanted[3], gather_k=k, weights=weights)
    del weighted_h, dh
    d_up_A = factor_gradient(low_y, hidden, where, wanted[0], gather_k=k)
    d_up_B = factor_gradient(passed.low_up, dup, where, wanted[1])
    dhidden = None
    if wants_hidden:
        dx = grouped_linear(dup, W.up.transpose(1, 2), where, low_y, up_A)
        dhidden = combine(dx, where, None, k, hidden.dtype)
    d_up_B, d_down_B = (None if d is None else d.transpose(1, 2) for d in (d_up_B, d_down_B))
    return dhidden, dweights.to(weights.dtype), d_up_A, d_up_B, d_down_A, d_down_B


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layer, hidden: Tensor, index: Tensor, weights: Tensor, base: int, *tensors: Tensor | None
    ) -> Tensor:
        W, loras = Weights(*tensors[:base]), Loras(*tensors[base:])  # type: ignore[arg-type]
        where = routing(index, W)
        out, passed, factors = forward_pass(layer, hidden, weights, where, W, loras)
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.spent = layer, False
            ctx.tiles = [(tiles.limit, tiles.block) for tiles in (where.small, where.large)]
            ctx.scalings = [factor and factor.scaling for factor in factors]
            sorted_rows = where.order, where.position, where.offs, where.small.table, where.large.table
            kept = [factor and factor.tensor for factor in factors]
            ctx.save_for_backward(hidden, weights, *passed, *sorted_rows, *kept, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        hidden, weights, up, low_up, low_down, order, position, offs, small, large, *rest = ctx.saved_tensors
        tiles = [Tiles(table, *size) for table, size in zip((small, large), ctx.tiles, strict=True)]
        where = Route(order, position, offs, tiles[0], tiles[1], weights.numel())
        factors = tuple(None if t is None else Factor(t, s) for t, s in zip(rest, ctx.scalings, strict=False))
        W, loras = Weights(*rest[4:8]), Loras(*rest[8:])
        if ctx.spent:  # a backward before this one has turned `up` into its gradient
            x, _, _ = gather(hidden, where, weights.shape[1], W.up.dtype, None)
            up = grouped_linear(x, W.up, where, low_up, factors[1], W.up_bias)
            del x
        ctx.spent = True
        needed = zip(loras.factors(ctx.layer), ctx.needs_input_grad[-4:], strict=True)
        wanted = tuple(factor if needs else None for factor, needs in needed)
        passed = Passed(up, low_up, low_down)
        dhidden, dweights, *gradients = backward_pass(
            ctx.layer, dout, hidden, weights, where, passed, factors, W, wanted, ctx.needs_input_grad[1]
        )
        return None, dhidden, None, dweights, None, *[None] * len(W), *gradients


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
