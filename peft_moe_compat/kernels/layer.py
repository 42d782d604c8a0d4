"""The experts layer as one autograd function.

Kept for the backward: the hidden states and routing of the tokens, the up projection's output, and the two "S R"
products with lora_A. Never the gathered rows, the activation or the down projection's output: the router's gradient
<down, d out> is <h, dh>, where dh is the gradient of h for an output that is not weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fused import Activation
from ..layout import ExpertLora, FlatLora
from . import activation, unfused
from .common import Factor
from .decode import MOST_ROWS, few_rows
from .factors import packed
from .gemm import grouped_linear
from .gradients import factor_gradient
from .routing import Route, Tiles, route
from .rows import combine, gather

__all__ = [
    "Factors",
    "Passed",
    "Weights",
    "backward_pass",
    "forward_pass",
    "fused_experts",
    "routing",
]


ActivationOf = Activation | Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """The frozen base: "E in out" views and biases "E out"."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Factors(NamedTuple):
    """lora_A and lora_B of the two projections by address, "E r d"; None where a projection has none."""

    up_A: Factor | None
    up_B: Factor | None
    down_A: Factor | None
    down_B: Factor | None

    @staticmethod
    def of(up: ExpertLora | FlatLora | None, down: ExpertLora | FlatLora | None) -> Factors:
        return Factors(*(up.factors() if up else (None, None)), *(down.factors() if down else (None, None)))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple([factor and factor.tensor for factor in self])

    def holding(self, tensors: Sequence[Tensor | None]) -> Factors:
        """The same of other tensors, or of none."""
        return Factors(*[f and Factor(t, *f[1:]) for f, t in zip(self, tensors, strict=True)])  # type: ignore[arg-type]


def _kernels(function: ActivationOf) -> Any:
    return activation if isinstance(function, Activation) else unfused


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
    function: ActivationOf, hidden: Tensor, weights: Tensor, where: Route, W: Weights, factors: Factors
) -> tuple[Tensor, Passed, Factors]:
    """(output "T H", what the backward needs, the factors with each lora_B packed)."""
    k, S = weights.shape[1], where.rows
    up_A, up_B, down_A, down_B = factors
    x, low_up, _ = gather(hidden, where, k, W.up.dtype, up_A)
    up_B = packed(up_B, W.up, S)  # after the gather, which keeps the device busy meanwhile
    up = grouped_linear(x, W.up, where, low_up, up_B, W.up_bias)
    del x
    h, low_down = _kernels(function).activate(up, function, where, down_A)
    down_B = packed(down_B, W.down, S)
    down = grouped_linear(h, W.down, where, low_down, down_B, W.down_bias)
    out = combine(down, where, weights, k, hidden.dtype)
    return out, Passed(up, low_up, low_down), Factors(up_A, up_B, down_A, down_B)


def backward_pass(
    function: ActivationOf,
    dout: Tensor,
    hidden: Tensor,
    weights: Tensor,
    where: Route,
    passed: Passed,
    factors: Factors,
    W: Weights,
    wanted: Sequence[Factor | None],
    wants_hidden: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states, the routing weights, and the tensors of `wanted`, each None where unwanted.

    Args:
        factors: As the forward used them.
        wanted: As the forward got them; None where no gradient is.
    """
    up_A, up_B, down_A, down_B = factors
    k, dout = weights.shape[1], dout.contiguous()
    g, low_g, dots = gather(dout, where, k, W.up.dtype, down_B, W.down_bias)
    dh = grouped_linear(g, W.down.transpose(1, 2), where, low_g, down_A)
    del g
    low_y, dweights = _kernels(function).activate_backward(passed.up, dh, function, where, weights, up_B, dots)
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
    return dhidden, dweights.to(weights.dtype), d_up_A, d_up_B, d_down_A, d_down_B


class _FusedExperts(torch.autograd.Function):
    """Takes the tensors that hold the factors themselves, so that there is no view to differentiate."""

    @staticmethod
    def forward(
        ctx: Any, function: ActivationOf, factors: Factors, hidden: Tensor, index: Tensor, weights: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        W = Weights(*tensors[:4])  # type: ignore[arg-type]
        where = routing(index, W)
        out, passed, used = forward_pass(function, hidden, weights, where, W, factors)
        ctx.function, ctx.spent = function, False
        ctx.tiles = where.small[1:], where.large[1:]
        ctx.factors, ctx.used = factors.holding(_NOTHING), used.holding(_NOTHING)
        sorted_rows = where.order, where.position, where.offs, where.small.table, where.large.table
        ctx.save_for_backward(hidden, weights, *passed, *sorted_rows, *used.tensors(), *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        hidden, weights, up, low_up, low_down, order, position, offs, small, large, *rest = ctx.saved_tensors
        tiles = Tiles(small, *ctx.tiles[0]), Tiles(large, *ctx.tiles[1])
        where = Route(order, position, offs, *tiles, weights.numel())
        used, W, factors = ctx.used.holding(rest[:4]), Weights(*rest[4:8]), ctx.factors.holding(rest[8:])
        if ctx.spent:  # a backward before this one has turned `up` into its gradient
            x, _, _ = gather(hidden, where, weights.shape[1], W.up.dtype, None)
            up = grouped_linear(x, W.up, where, low_up, used.up_B, W.up_bias)
            del x
        ctx.spent = True
        _, _, wants_hidden, _, _, *of_tensors = ctx.needs_input_grad
        wanted = [factor if needs else None for factor, needs in zip(factors, of_tensors[4:], strict=True)]
        passed = Passed(up, low_up, low_down)
        dhidden, dweights, *gradients = backward_pass(
            ctx.function, dout, hidden, weights, where, passed, used, W, wanted, wants_hidden
        )
        return None, None, dhidden, None, dweights, *_NOTHING, *gradients


_NOTHING = (None, None, None, None)


def fused_experts(
    function: ActivationOf, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, W: Weights, factors: Factors
) -> Tensor:
    """Routed experts with LoRA, forward and backward in fused kernels.

    Args:
        function: A fused activation, or the module's own function of the up projection's rows.
        hidden: "T H".
        top_k_index, top_k_weights: "T k"; ids outside 0..E-1 contribute nothing.
        W, factors: See there. The base weights must need no gradient.

    Returns:
        "T H" in the dtype of `hidden`.
    """
    hidden, top_k_weights = hidden.contiguous(), top_k_weights.contiguous()
    tensors = factors.tensors()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, top_k_weights, *tensors)):
        out: Tensor = _FusedExperts.apply(function, factors, hidden, top_k_index, top_k_weights, *W, *tensors)
        return out
    if top_k_index.numel() <= MOST_ROWS and isinstance(function, Activation):
        return few_rows(function, hidden, top_k_index.contiguous(), top_k_weights, W, factors)
    with torch.no_grad():
        return forward_pass(function, hidden, top_k_weights, routing(top_k_index, W), W, factors)[0]
