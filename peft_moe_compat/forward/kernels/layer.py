"""The experts layer as one autograd function.

Kept for the backward: the hidden states and routing of the tokens, the up projection's output, and the two "S R"
products with lora_A. Never the gathered rows, the activation or the down projection's output: the router's gradient
<down, d out> is <h, dh>, where dh is the gradient of h for an output that is not weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...layout import ExpertLora, FlatLora
from ...model.packed import PackedWeight
from . import activation, custom_activation
from .common import Factor
from .decode import few_rows, most_rows
from .dropout import Drop, Kept, drawn, kept_of
from .factors import packed
from .gradients import factor_gradient
from .interface import Nonlinearity
from .launch import LAUNCH_ERRORS
from .packed_gemm import linear
from .routing import Route, Tiles, route
from .rows import combine, gather

__all__ = [
    "LAUNCH_ERRORS",
    "Passed",
    "Projection",
    "any_trains",
    "backward_pass",
    "forward_pass",
    "fused_experts",
    "routing",
    "tile_sizes",
]


ActivationOf = Nonlinearity | Callable[[Tensor], Tensor]


class Projection(NamedTuple):
    """The up or the down projection: its frozen base, and LoRA by address; None for what it does not have.

    Attributes:
        weight: "E in out", a view of the parameter, or a quantised one's packed form.
        bias: "E out".
        A, B: "E r in" and "E r out".
        packed: B as the products read it, see `factors.packed`.
        drop: Of the rows that meet A.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    A: Factor | None = None
    B: Factor | None = None
    packed: Factor | None = None
    drop: Drop | None = None

    @staticmethod
    def of(weight: Tensor | PackedWeight, bias: Tensor | None, lora: ExpertLora | FlatLora | None) -> Projection:
        A, B = lora.factors() if lora else (None, None)
        return Projection(weight, bias, A, B, drop=drawn(lora, weight.device))

    def ready(self, rows: int) -> Projection:
        """The same for a product of that many rows."""
        return Projection(*self[:4], packed(self.B, self.weight, rows), self.drop)


def _kernels(function: ActivationOf) -> Any:
    return activation if isinstance(function, Nonlinearity) else custom_activation


def tile_sizes(S: int, E: int) -> tuple[int, int]:
    """Rows of a tile for the kernels bound by memory and for the products, by the rows an expert gets on average."""
    rows = S // E
    if rows >= 64:
        return 64, 128
    if rows >= 16:
        return 64, 64
    return (16, 64) if rows >= 4 else (16, 16)  # products of tiles of 16 rows are torch's: more launches, fewer zeros


class Passed(NamedTuple):
    """What a forward leaves for its backward.

    Attributes:
        up: "S (2 I)" or "S I", the up projection's output; `backward_pass` overwrites it.
        low_up, low_down: "S R", the products with the two lora_A; None where there is none.
    """

    up: Tensor
    low_up: Tensor | None
    low_down: Tensor | None


def routing(index: Tensor, num_experts: int) -> Route:
    """The routed rows sorted by their experts, for `forward_pass` and `backward_pass`."""
    return route(index, num_experts, *tile_sizes(index.numel(), num_experts))


def forward_pass(
    function: ActivationOf,
    hidden: Tensor,
    weights: Tensor,
    where: Route,
    up: Projection,
    read_down: Callable[[], Projection],
) -> tuple[Tensor, Passed, Projection, Projection]:
    """(output "T H", what the backward needs, and both projections as they were used).

    Whatever a kernel does not need is read and computed after its launch, which keeps the device busy meanwhile.
    """
    k, S = weights.shape[1], where.rows
    kept = kept_of(up.drop, where, up.weight.shape[1])
    x, low_up, _ = gather(hidden, where, k, up.weight.dtype, up.A, kept=kept)
    up = up.ready(S)
    # What the activation, "S I", will take: half of the up projection's out-features, or more where nothing is gated.
    room = S * (up.weight.shape[2] // 2) * x.element_size()
    rows = linear(x, up.weight, where, low_up, up.packed, up.bias, room=room)
    del x
    down = read_down()
    kept = kept_of(down.drop, where, down.weight.shape[1])
    h, low_down = _kernels(function).activate(rows, function, where, down.A, kept)
    down = down.ready(S)
    y = linear(h, down.weight, where, low_down, down.packed, down.bias)
    return combine(y, where, weights, k, hidden.dtype), Passed(rows, low_up, low_down), up, down


def backward_pass(
    function: ActivationOf,
    dout: Tensor,
    hidden: Tensor,
    weights: Tensor,
    where: Route,
    passed: Passed,
    up: Projection,
    down: Projection,
    wanted: Sequence[Factor | None],
    wants_hidden: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states, the routing weights, and the tensors of `wanted`, each None where unwanted.

    Args:
        up, down: As the forward used them.
        wanted: A and B of both; None where no gradient is.
    """
    k, dout = weights.shape[1], dout.contiguous()
    g, low_g, dots = gather(dout, where, k, up.weight.dtype, down.packed, down.bias)
    kept = kept_of(down.drop, where, down.weight.shape[1])
    dh = _to_rows(g, down, where, low_g, kept)
    del g
    low_y, dweights = _kernels(function).activate_backward(passed.up, dh, function, where, weights, up.packed, dots)
    dup, weighted_h = passed.up, dh
    d_down_A = factor_gradient(low_g, weighted_h, where, wanted[2], kept=kept)
    d_down_B = factor_gradient(passed.low_down, dout, where, wanted[3], gather_k=k, weights=weights)
    room = dh.nbytes - sum(found.nbytes for found in (d_down_A, d_down_B) if found is not None)
    del weighted_h, dh
    kept = kept_of(up.drop, where, up.weight.shape[1])
    dhidden = None
    if wants_hidden:
        dx = _to_rows(dup, up, where, low_y, kept, room)
        dhidden = combine(dx, where, None, k, hidden.dtype)
        del dx
    d_up_A = factor_gradient(low_y, hidden, where, wanted[0], gather_k=k, kept=kept)
    d_up_B = factor_gradient(passed.low_up, dup, where, wanted[1])
    return dhidden, dweights.to(weights.dtype), d_up_A, d_up_B, d_down_A, d_down_B


def _to_rows(
    gradient: Tensor, through: Projection, where: Route, low: Tensor | None, kept: Kept | None, room: int = 0
) -> Tensor:
    """The gradient of a projection's output "S out" -> of its rows "S in"; `low` is its product with lora_B."""
    return linear(gradient, through.weight.mT, where, low, through.A, kept=kept, room=room)


def _apart(weight: Tensor | PackedWeight) -> tuple[tuple[Any, ...] | None, tuple[Tensor | None, ...]]:
    """(what is no tensor of a packed weight, its tensors), or (None, the weight itself)."""
    return (weight[:4], weight[4:]) if isinstance(weight, PackedWeight) else (None, (weight,))


def _together(fixed: tuple[Any, ...] | None, tensors: Iterator[Any]) -> Tensor | PackedWeight:
    """The inverse of `_apart`, taking what it needs of `tensors`."""
    if fixed is None:
        return next(tensors)  # type: ignore[no-any-return]
    return PackedWeight._make([*fixed, *islice(tensors, len(PackedWeight._fields) - len(fixed))])


class _FusedExperts(torch.autograd.Function):
    """The backward of a forward that has run: its kernels are launched before autograd does its own work.

    Takes the tensors that hold the factors themselves, so that there is no view to differentiate.
    """

    @staticmethod
    def forward(
        ctx: Any, function: ActivationOf, where: Route, ran: tuple[Tensor, Passed, Projection, Projection],
        hidden: Tensor, weights: Tensor, *_leaves: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, passed, up, down = ran
        seed_up, p_up = up.drop or (None, None)
        seed_down, p_down = down.drop or (None, None)
        factors = *up[2:5], *down[2:5]
        (fixed_up, of_up), (fixed_down, of_down) = _apart(up.weight), _apart(down.weight)
        ctx.function, ctx.spent = function, False
        ctx.p, ctx.bases = (p_up, p_down), (fixed_up, fixed_down)
        ctx.tiles = where.small[1:], where.large[1:]
        ctx.places = [factor and factor[1:] for factor in factors]
        sorted_rows = where.order, where.position, where.offs, where.small.table, where.large.table
        tensors = [factor and factor.tensor for factor in factors]
        kept = up.bias, down.bias, seed_up, seed_down, *tensors, *of_up, *of_down
        ctx.save_for_backward(hidden, weights, *passed, *sorted_rows, *kept, where.places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        hidden, weights, *kept = ctx.saved_tensors
        passed, (order, position, offs, small, large) = Passed(*kept[:3]), kept[3:8]
        tiles = Tiles(small, *ctx.tiles[0]), Tiles(large, *ctx.tiles[1])
        where = Route(order, position, offs, *tiles, weights.numel(), kept[-1])
        factors = [at and Factor(tensor, *at) for tensor, at in zip(kept[12:18], ctx.places, strict=True)]
        drops = [None if p is None else Drop(seed, p) for seed, p in zip(kept[10:12], ctx.p, strict=True)]
        bases = iter(kept[18:])
        up = Projection._make((_together(ctx.bases[0], bases), kept[8], *factors[:3], drops[0]))
        down = Projection._make((_together(ctx.bases[1], bases), kept[9], *factors[3:], drops[1]))
        if ctx.spent:  # a backward before this one has turned `up` into its gradient
            x, _, _ = gather(hidden, where, weights.shape[1], up.weight.dtype, None)
            passed = passed._replace(up=linear(x, up.weight, where, passed.low_up, up.packed, up.bias))
            del x
        ctx.spent = True
        _, _, _, wants_hidden, _, *needs = ctx.needs_input_grad
        wanted = [f if needed else None for f, needed in zip((*up[2:4], *down[2:4]), needs, strict=True)]
        gradients = backward_pass(ctx.function, dout, hidden, weights, where, passed, up, down, wanted, wants_hidden)
        return None, None, None, *gradients


def _leaves(hidden: Tensor, weights: Tensor, up: Projection, down: Projection) -> tuple[Tensor | None, ...]:
    """What a gradient may be wanted of."""
    return hidden, weights, *[factor and factor.tensor for factor in (*up[2:4], *down[2:4])]


def any_trains(leaves: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for leaf in leaves:  # not `any`, whose generator takes twice as long
            if leaf is not None and leaf.requires_grad:
                return True
    return False


def fused_experts(
    function: ActivationOf,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Projection,
    read_down: Callable[[], Projection],
    places: Tensor | None = None,
) -> Tensor:
    """Routed experts with LoRA, forward and backward in fused kernels.

    Args:
        function: A fused activation, or the module's own function of the up projection's rows.
        hidden: "T H".
        top_k_index, top_k_weights: "T k"; ids outside 0..E-1 contribute nothing.
        up: The base weights must need no gradient.
        read_down: Gives the down projection, once the device is busy with the other; may be called twice.
        places: "T k", see `experts_forward`.

    Returns:
        "T H" in the dtype of `hidden`.
    """
    hidden, top_k_weights = hidden.contiguous(), top_k_weights.contiguous()
    if top_k_index.numel() <= most_rows(up.weight) and isinstance(function, Nonlinearity):
        down = read_down()
        few = top_k_index.numel() <= most_rows(up.weight, down.weight) and not (up.drop or down.drop)
        if few and not any_trains(_leaves(hidden, top_k_weights, up, down)):
            return few_rows(function, hidden, top_k_index.contiguous(), top_k_weights, up, down)
    where = routing(top_k_index, up.weight.shape[0])
    if places is not None:  # the order of rows that no expert here computes is undefined
        order = where.order[: where.rows].clamp(0, where.rows - 1)
        where = where._replace(places=places.reshape(-1)[order].to(torch.int32))
    ran = forward_pass(function, hidden, top_k_weights, where, up, read_down)
    leaves = _leaves(hidden, top_k_weights, *ran[2:])
    return _FusedExperts.apply(function, where, ran, *leaves) if any_trains(leaves) else ran[0]
