"""The kernels as a layer will launch them, tried on a small problem before the first real one.

A miscompiled kernel may be wrong for one size of tiles alone. So what is run here is compiled from the same constants
as a layer of that `Kind`, and compared with the same computed densely by torch; the routing, at the layer's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...layout import ExpertLora, FlatLora, flat, to_flat
from ...model.packed import Codec, PackedWeight, encoded
from .decode import few_rows
from .dropout import Kept, kept_of
from .interface import HeldProjection, Nonlinearity
from .kinds import Held, Kind
from .launch import compiled_together
from .layer import Projection, backward_pass, forward_pass
from .packed_gemm import MANY
from .routing import Route, Tiles, route

__all__ = ["worst_error"]

# What the up projection gives lies around these, away from where a slope jumps (0, and the limit): rounding would put
# some elements on the other side.
_CENTRES, _LIMIT = (-4.0, 1.3, 4.0), 2.6


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda rows: functional.relu(rows).square(),
    "silu": functional.silu,
}


def _function(known: Nonlinearity, rows: Tensor) -> Tensor:
    """The same as the kernels compute, by torch."""
    if not known.gated:
        return _ACTIVATIONS[known.name](rows)
    gate, up = (rows[:, ::2], rows[:, 1::2]) if known.interleaved else rows.chunk(2, 1)
    if known.name == "clamped":
        gate, up = gate.clamp(max=known.limit), up.clamp(-known.limit, known.limit)
        return gate * torch.sigmoid(known.alpha * gate) * (up + 1)
    return _ACTIVATIONS[known.name](gate) * up


def _dense(
    function: Callable[[Tensor], Tensor],
    routed: tuple[Tensor, Tensor, Tensor],
    up: HeldProjection,
    down: HeldProjection,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The layer's output in float32: every token through each expert that one of them chose.

    With masks "T k in", of what meets lora_A of up and down, once for each of its k places.
    """
    hidden, index, weights = routed

    stacks = [held[0].decoded() if isinstance(held[0], PackedWeight) else held[0] for held in (up, down)]

    def project(x: Tensor, e: int, held: HeldProjection, stack: Tensor, mask: Tensor | None) -> Tensor:
        _, bias, lora = held
        y = x @ stack[e].float()
        if lora is not None:
            factors = lora.canonical()
            x = x if mask is None else x * mask
            y = y + lora.scaling * (x @ factors.A[e].float().T) @ factors.B[e].float().T
        return y if bias is None else y + bias[e].float()

    out = torch.zeros_like(hidden, dtype=torch.float32)
    for e in (each for each in index.unique().tolist() if each < up[0].shape[0]):
        chosen = weights.float() * (index == e)
        for j in range(1 if masks == (None, None) else index.shape[1]):
            of_up, of_down = (None if mask is None else mask[:, j] for mask in masks)
            h = function(project(hidden.float(), e, up, stacks[0], of_up))
            share = chosen.sum(1) if masks == (None, None) else chosen[:, j]
            out = out + project(h, e, down, stacks[1], of_down) * share.unsqueeze(1)
    return out


def _sorted(index: Tensor, E: int, small: int, large: int) -> Route:
    """What `routing.route` finds, by torch."""
    ids = index.reshape(-1)
    order = torch.sort(ids, stable=True).indices
    counts = torch.bincount(ids, minlength=E)[:E]
    ends = counts.cumsum(0)

    def tiles(block: int) -> Tiles:
        needed = -(-counts // block)
        expert = torch.repeat_interleave(needed)
        place = torch.arange(len(expert), device=ids.device) - (needed.cumsum(0) - needed)[expert]
        table = torch.stack([expert, (ends - counts)[expert] + place * block], 1).reshape(-1)
        return Tiles(torch.cat([table, table.new_tensor([len(expert), 0])]).int(), len(expert), block)

    position = torch.where(ids < E, order.argsort(), -1)
    return Route(order.int(), position.int(), ends.int(), tiles(small), tiles(large), len(ids))


def _defined(where: Route) -> list[Tensor]:
    """What there is to compare: rows that are computed elsewhere have no order, and tables end where the tiles do."""
    tables = [table[: 2 * int(table[2 * limit])] for table, limit, _ in (where.small, where.large)]
    return [where.order[: int(where.offs[-1])], where.position[: where.rows], where.offs, *tables]


def masks(of: Projection, where: Route, k: int) -> Tensor | None:
    """What a projection's dropout multiplies its rows by, "T k in"."""
    if of.drop is None:
        return None
    K = of.weight.shape[1]
    (words, p), i = cast(Kept, kept_of(of.drop, where, K)), torch.arange(32, device=where.order.device)
    rows = (words.unsqueeze(2) >> i & 1).flatten(1)[:, :K] / (1 - p)
    return rows[where.position[: where.rows].clamp(min=0).long()].view(-1, k, K)


class _Drawn:
    """Random tensors of a kind, the same at every trial."""

    def __init__(self, device: torch.device, kind: Kind) -> None:
        self.generator, self.device, self.kind = torch.Generator(device).manual_seed(0), device, kind

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of about 1 in norm along the last axis."""
        drawn: Tensor = torch.randn(shape, generator=self.generator, device=self.device) / shape[-1] ** 0.5
        return drawn.to(dtype)

    def one_of(self, values: Sequence[float], *shape: int) -> Tensor:
        at = torch.randint(len(values), shape, generator=self.generator, device=self.device)
        return torch.tensor(values, device=self.device)[at]

    def index(self, T: int, experts: Sequence[int]) -> Tensor:
        """ "T k"."""
        return self.one_of(experts, T, self.kind.k).to(self.kind.dtypes[1])

    def encoded(self, exact: Tensor, codec: Codec) -> PackedWeight:
        _, rows, columns = exact.shape
        height, width = rows if codec.height < 0 else codec.height, columns if codec.width < 0 else codec.width
        width = 2 if not height and rows * columns % width else width
        return encoded(exact.contiguous(), codec._replace(height=height, width=width), self.kind.dtypes[3])

    def held(self, of: Held, K: int, N: int, mean: Tensor | None = None) -> HeldProjection:
        """A projection; with `mean`, the mean of its rows "K", one whose results lie around `_CENTRES`."""
        E = self.kind.sizes[0]
        exact = self.floats(E, N, K)
        if mean is not None:
            exact = 0.15 * exact + self.one_of(_CENTRES, E, N, 1) * mean / K
        exact = exact if of.along_in else exact.mT
        weight: Tensor | PackedWeight
        if of.codec is not None:
            weight = self.encoded(exact, Codec(*of.codec))
        else:
            stored = exact.to(self.kind.dtypes[3])
            weight = stored.contiguous() if of.packed else functional.pad(stored, (0, 8))[..., :-8]
        bias = None if of.bias is None else self.floats(E, N, dtype=of.bias)
        lora: ExpertLora | FlatLora | None = None
        if of.lora is not None:
            r, orientation, packing, *dtypes, drops = of.lora
            dropout = ((r, 0.5),) if drops else ()
            lora = ExpertLora(self.floats(E, r, K), self.floats(E, N, r), 0.15)
            A, B = to_flat(lora, orientation=orientation, packing=packing) if orientation else (lora.A, lora.B)
            A, B = (t.to(dtype).contiguous().requires_grad_() for t, dtype in zip((A, B), dtypes, strict=True))
            if orientation:
                lora = flat(A, B, E, orientation=orientation, packing=packing, scaling=lora.scaling)
                lora = lora._replace(dropout=dropout)
            else:
                lora = ExpertLora(A, B, lora.scaling, dropout)
        return weight.mT if of.along_in else weight, bias, lora


def _launched(
    kind: Kind, function: Any, routed: tuple[Tensor, Tensor, Tensor], where: Route, up: Projection, down: Projection,
    dout: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The output, and with a backward the gradients."""
    hidden, _, weights = routed
    with torch.no_grad():
        if kind.tiles is None:
            return [few_rows(function, *routed, up, down)]
        out, passed, of_up, of_down = forward_pass(function, hidden, weights, where, up, lambda: down)
        if not kind.trains:
            return [out]
        wanted = *of_up[2:4], *of_down[2:4]
        found = backward_pass(function, dout, hidden, weights, where, passed, of_up, of_down, wanted, True)
    return [out, *(each for each in found if each is not None)]


def worst_error(device: torch.device, values: tuple[Any, ...], rows: int) -> float:
    """The largest difference of the output or of any gradient, over that tensor's largest entry.

    Raises ArithmeticError where that many rows are sorted wrongly, and whatever a kernel raises that cannot be built.

    Args:
        values: Of the kind, from `kinds.kind_of`.
    """
    kind = Kind(*values)
    kind = kind._replace(up=Held(*kind.up), down=Held(*kind.down))
    drawn, k = _Drawn(device, kind), kind.k
    num_experts = kind.steps[0] if kind.tiles else 0
    to_sort = drawn.index(-(-rows // k), range(num_experts + 1))
    (E, H, I), (of_hidden, _, of_weights, _) = kind.sizes, kind.dtypes
    # Two and a half of the larger tiles. 60 % of the rows go to one expert, which makes a full tile and a ragged one;
    # none to another where there are four, and some to those of another rank.
    least = kind.ahead * E if kind.ahead else kind.tiles[1] * 5 // 2 if kind.tiles else 8
    if not kind.ahead and (kind.up.codec or kind.down.codec):
        least = min(least, MANY[0] * E - k)
    T = 1 if kind.sparse else -(-least // k)
    index = drawn.index(T, [0] * 12 + [E - 1] * 5 + [1 % E] * 2 + [E])
    index[0, 0] = 0
    mean = drawn.one_of([-1.0, 1.0], H)
    hidden = (mean + 0.25 * H**0.5 * drawn.floats(T, H)).to(of_hidden).requires_grad_()
    weights = drawn.floats(T, k, dtype=of_weights).abs().requires_grad_()
    up, down = drawn.held(kind.up, H, 2 * I if kind.gated else I, mean), drawn.held(kind.down, I, H)
    known = Nonlinearity(*(kind.nonlinearity or ("silu", kind.gated, False)), alpha=1.7, limit=_LIMIT)
    dense = partial(_function, known)
    function = known if kind.nonlinearity else dense
    of_up, of_down = Projection.of(*up), Projection.of(*down)
    where = _sorted(index, E, *(kind.tiles or (16, 16)))
    launched = partial(_launched, kind, function, (hidden, index, weights), where, of_up, of_down)
    with compiled_together() as alone:
        if alone:
            launched(hidden.detach())
            if kind.tiles is not None:
                route(to_sort, num_experts, *kind.tiles)
    if kind.tiles is not None:
        found, exact = (_defined(sort(to_sort, num_experts, *kind.tiles)) for sort in (route, _sorted))
        if not all(map(torch.equal, found, exact)):
            raise ArithmeticError(f"the rows of {num_experts} experts are sorted wrongly")
    expected = _dense(dense, (hidden, index, weights), up, down, (masks(of_up, where, k), masks(of_down, where, k)))
    exact, dout = [expected], hidden.detach()
    if kind.trains:
        # Along the output, so that no router's gradient is what is left of terms that cancel.
        along = expected.detach() / expected.detach().std() + H**0.5 * drawn.floats(T, H)
        dout = along.to(of_hidden)
        factors = *of_up[2:4], *of_down[2:4]
        leaves = [hidden, weights, *(factor.tensor for factor in factors if factor)]
        exact += torch.autograd.grad(expected, leaves, dout.float())
    found = launched(dout)
    with torch.no_grad():
        errors = [(ours.float() - to).abs().max() / to.abs().max() for ours, to in zip(found, exact, strict=True)]
        return torch.stack(errors).max().item()
