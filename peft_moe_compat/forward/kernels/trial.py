"""The kernels as a layer will launch them, tried on a small problem before the first real one.

A miscompiled kernel may be wrong for one size of tiles alone. So what is run here is compiled from the same constants
as a layer of that `Kind`, and compared with the same computed densely by torch; the routing, at the layer's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import index as constant
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...layout import ExpertLora, FlatLora, flat, to_flat
from ...model.packed import Codec, PackedWeight, encoded
from .decode import MOST_PACKED_ROWS, MOST_ROWS, few_rows, most_rows
from .dropout import Kept, kept_of
from .interface import HeldProjection, Nonlinearity
from .launch import compiled_together
from .layer import Projection, any_trains, backward_pass, forward_pass, tile_sizes
from .packed_gemm import MANY
from .routing import Route, Tiles, route, steps

__all__ = ["Kind", "kind_of", "rows_of_every_kind", "worst_error"]

# What the up projection gives lies around these, away from where a slope jumps (0, and the limit): rounding would put
# some elements on the other side.
_CENTRES, _LIMIT = (-4.0, 1.3, 4.0), 2.6


class Held(NamedTuple):
    """How a projection is held.

    Attributes:
        along_in: Whether a weight's in-features lie contiguous.
        packed: Whether it has no gaps and starts on 16 bytes.
        bias: Its dtype.
        lora: (rank, orientation, packing, dtypes of both factors, whether it has a dropout); orientation and packing
            empty for an `ExpertLora`.
        codec: Of a quantised weight; a height or width of -1 is a whole expert's.
    """

    along_in: bool
    packed: bool
    bias: torch.dtype | None
    lora: tuple[int, str, str, torch.dtype, torch.dtype, bool] | None
    codec: tuple[Any, ...] | None


class Kind(NamedTuple):
    """All that the kernels of a layer and batch are compiled for: constants, which a graph is guarded by.

    Attributes:
        dtypes: Of the hidden states, the index, the routing weights, and the base weights.
        sizes: E, H and I of a small layer whose kernels are the same: congruent, so that strides divide alike.
        k: Experts of a token.
        nonlinearity: Without its alpha and limit, which kernels take as arguments; None for a module's own.
        gated: Whether the up projection is twice as wide.
        up, down: How both projections are held.
        trains: Whether there is a backward.
        tiles: Rows of the small and large tiles; None for the kernels of few rows.
        sparse: Whether there are fewer rows than experts.
        ahead: The largest of `packed_gemm.MANY` that a quantised stack has of rows to an expert; 0 where none.
        steps: The routing's.
    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, int, int]
    k: int
    nonlinearity: tuple[str, bool, bool] | None
    gated: bool
    up: Held
    down: Held
    trains: bool
    tiles: tuple[int, int] | None
    sparse: bool
    ahead: int
    steps: tuple[int, ...]


def _reduced(size: int, least: int, unit: int) -> int:
    """The smallest size from `least` on that is congruent to a larger one."""
    return size if size < least + unit else least + (size - least) % unit


def _tensors(lora: ExpertLora | FlatLora | None) -> tuple[Tensor, ...]:
    if lora is None:
        return ()
    return lora[:2] if isinstance(lora, FlatLora) else (lora.A, lora.B)


def _held(weight: Tensor | PackedWeight, bias: Tensor | None, lora: ExpertLora | FlatLora | None) -> tuple[Any, ...]:
    """`Held` as a tuple."""
    form = codec = None
    if isinstance(weight, PackedWeight):
        along_in, packed, aligned, codec = not weight.rows_are_in, True, True, weight.codec
        if codec.height:
            sizes = zip(codec[2:4], weight.stored[1:], strict=True)
            height, width = (-1 if block >= size else block for block, size in sizes)
            codec = codec._replace(height=height, width=width)
    else:
        along_in = weight.stride(1) == 1
        packed = (weight.mT if along_in else weight).is_contiguous()
        aligned = torch.compiler.is_compiling() or weight.data_ptr() % 16 == 0  # a graph's tensors have no address yet
    if lora is not None:
        A, B = _tensors(lora)
        order = (lora.orientation, lora.packing) if isinstance(lora, FlatLora) else ("", "")
        form = (constant(lora.rank), *order, A.dtype, B.dtype, bool(lora.dropout))
    return (
        along_in,
        packed and aligned,
        None if bias is None else bias.dtype,
        form,
        codec and tuple(map(constant, codec)),
    )


def kind_of(
    nonlinearity: Nonlinearity | Callable[[Tensor], Tensor],
    routed: tuple[Tensor, Tensor, Tensor],
    up: HeldProjection,
    down: HeldProjection,
    rows: int,
) -> tuple[Any, ...]:
    """What the kernels of a layer are compiled for with that many rows: a `Kind`, in the plain tuples dynamo wants.

    Args:
        routed: hidden_states "T H", top_k_index and top_k_weights "T k".
    """
    hidden, index, weights = routed
    E, H, N, I, k = map(constant, (*up[0].shape, down[0].shape[1], index.shape[1]))
    trains = any_trains([hidden, weights, *_tensors(up[2]), *_tensors(down[2])])
    known = tuple(nonlinearity[:3]) if isinstance(nonlinearity, Nonlinearity) else None
    drops = any(lora is not None and lora.dropout for _, _, lora in (up, down))
    packed = isinstance(up[0], PackedWeight) or isinstance(down[0], PackedWeight)
    few = rows <= most_rows(up[0], down[0]) and known is not None and not (trains or drops)
    return (
        (hidden.dtype, index.dtype, weights.dtype, up[0].dtype),
        (_reduced(E, max(4, k + 1), 16), _reduced(H, 576, 64), _reduced(I, 576, 64)),
        k,
        known,
        N != I,
        _held(*up),
        _held(*down),
        trains,
        None if few else tile_sizes(rows, E),
        not few and rows < E,
        max(least * (rows >= least * E) for least in (0, *MANY)) if packed else 0,
        () if few else (E, *steps(rows, E)),
    )


def rows_of_every_kind(E: int, k: int, packed: bool) -> list[int]:
    """Numbers of rows, one at least for every size of tiles: for a graph, which does not know its own."""
    E, k = constant(E), constant(k)
    return [k, MOST_PACKED_ROWS + 1, MOST_ROWS + 1, E, 16 * E, 64 * E, *[least * E for least in MANY if packed]]


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
        values: Of the kind, from `kind_of`.
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
