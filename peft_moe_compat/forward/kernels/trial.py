"""The kernels as a layer will launch them, tried on a small problem before the first real one.

A miscompiled kernel may be wrong for one size of tiles alone. So what is run here is compiled from the same constants
as a layer of that `Kind`, and compared with the same computed densely by torch; the routing, at the layer's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import index as constant
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...layout import ExpertLora, FlatLora
from .decode import MOST_ROWS, few_rows
from .interface import HeldProjection, Nonlinearity
from .layer import Projection, any_trains, backward_pass, forward_pass, tile_sizes
from .routing import Route, Tiles, route, steps

__all__ = ["Kind", "kind_of", "rows_of_every_kind", "worst_error"]

_DECODED_ROWS = 8
_SCALING = 0.15
# What the up projection gives lies around these, away from where a slope jumps (0, and the limit): rounding would put
# some elements on the other side.
_CENTRES, _LIMIT = (-4.0, 1.3, 4.0), 2.6


class Held(NamedTuple):
    """How a projection is held.

    Attributes:
        along_in: Whether a weight's in-features lie contiguous.
        packed: Whether it has no gaps and starts on 16 bytes.
        bias: Its dtype.
        lora: (rank, orientation, packing, dtypes of both factors); the middle two empty for an `ExpertLora`.
    """

    along_in: bool
    packed: bool
    bias: torch.dtype | None
    lora: tuple[int, str, str, torch.dtype, torch.dtype] | None


class Kind(NamedTuple):
    """All that the kernels of a layer and batch are compiled for.

    Attributes:
        dtypes: Of the hidden states, the index, the routing weights, and the base weights.
        sizes: E, H and I of a small layer whose kernels are the same: congruent, so that strides divide alike.
        k: Experts of a token.
        nonlinearity: None for a module's own. Its alpha and limit, which kernels take as arguments, are others.
        gated: Whether the up projection is twice as wide.
        up, down: How both projections are held.
        trains: Whether there is a backward.
        tiles: Rows of the small and large tiles; None for the kernels of few rows.
        sparse: Whether there are fewer rows than experts.
        steps: The routing's.
    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, int, int]
    k: int
    nonlinearity: Nonlinearity | None
    gated: bool
    up: Held
    down: Held
    trains: bool
    tiles: tuple[int, int] | None
    sparse: bool
    steps: tuple[int, ...]

    @staticmethod
    def of(values: tuple[Any, ...]) -> Kind:
        """From what `kind_of` gives."""
        dtypes, sizes, k, nonlinearity, gated, up, down, *rest = values
        known = nonlinearity and Nonlinearity(*nonlinearity)._replace(alpha=1.7, limit=_LIMIT)
        return Kind(dtypes, sizes, k, known, gated, Held(*up), Held(*down), *rest)


def _reduced(size: int, least: int, unit: int) -> int:
    """The smallest size from `least` on that is congruent to a larger one."""
    return size if size < least + unit else least + (size - least) % unit


def _tensors(lora: ExpertLora | FlatLora | None) -> tuple[Tensor, ...]:
    if lora is None:
        return ()
    return lora[:2] if isinstance(lora, FlatLora) else (lora.A, lora.B)


def _held(held: HeldProjection, compiling: bool) -> tuple[Any, ...]:
    """`Held` as a tuple."""
    weight, bias, lora = held
    _, K, N, *strides = map(constant, (*weight.shape, *weight.stride()))
    along_in = strides[1] == 1
    packed = strides == ([K * N, 1, K] if along_in else [K * N, N, 1])
    form = None
    if lora is not None:
        A, B = _tensors(lora)
        form = (
            constant(lora.rank),
            *((lora.orientation, lora.packing) if isinstance(lora, FlatLora) else ("", "")),
            A.dtype,
            B.dtype,
        )
    aligned = compiling or weight.data_ptr() % 16 == 0  # a graph's tensors have no address yet
    return along_in, packed and aligned, None if bias is None else bias.dtype, form


def kind_of(
    nonlinearity: Nonlinearity | Callable[[Tensor], Tensor],
    routed: tuple[Tensor, Tensor, Tensor],
    up: HeldProjection,
    down: HeldProjection,
    rows: int,
) -> tuple[Any, ...]:
    """What the kernels of a layer are compiled for with that many rows: a `Kind`, in tuples as a graph's constants are.

    Args:
        routed: hidden_states "T H", top_k_index and top_k_weights "T k".
    """
    (hidden, index, weights), compiling = routed, torch.compiler.is_compiling()
    (E, H, N), I, k = up[0].shape, down[0].shape[1], index.shape[1]
    E, H, N, I, k = (
        constant(E),
        constant(H),
        constant(N),
        constant(I),
        constant(k),
    )  # constants of a graph, which it is guarded by
    trains = torch.is_grad_enabled() and any_trains([hidden, weights, *_tensors(up[2]), *_tensors(down[2])])
    known = nonlinearity if isinstance(nonlinearity, Nonlinearity) else None
    few = rows <= MOST_ROWS and known is not None and not trains
    return (
        (hidden.dtype, index.dtype, weights.dtype, up[0].dtype),
        (_reduced(E, max(4, k + 1), 16), _reduced(H, 576, 64), _reduced(I, 576, 64)),
        k,
        None if known is None else tuple(known[:3]),
        N != I,
        _held(up, compiling),
        _held(down, compiling),
        trains,
        None if few else tile_sizes(rows, E),
        not few and rows < E,
        () if few else (E, *steps(rows, E)),
    )


def rows_of_every_kind(E: int, k: int) -> list[int]:
    """Numbers of rows, one at least for every size of tiles: for a graph, which does not know its own."""
    E, k = constant(E), constant(k)
    return [k, E, 16 * E, MOST_ROWS + 1, 64 * E]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
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
) -> Tensor:
    """The layer's output in float32, expert by expert."""
    hidden, index, weights = routed

    def project(x: Tensor, e: int, held: HeldProjection) -> Tensor:
        weight, bias, lora = held
        y = x @ weight[e].float()
        if lora is not None:
            factors = lora.canonical()
            y = y + lora.scaling * (x @ factors.A[e].float().T) @ factors.B[e].float().T
        return y if bias is None else y + bias[e].float()

    out = torch.zeros_like(hidden, dtype=torch.float32)
    for e in (each for each in index.unique().tolist() if each < up[0].shape[0]):
        token, place = (index == e).nonzero(as_tuple=True)
        h = function(project(hidden[token].float(), e, up))
        out = out.index_add(0, token, project(h, e, down) * weights[token, place, None].float())
    return out


def _sorted(index: Tensor, E: int, small: int, large: int) -> Route:
    """What `routing.route` finds, by torch."""
    flat = index.reshape(-1)
    ends = torch.bincount(flat, minlength=E)[:E].cumsum(0)
    order = torch.sort(flat, stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(len(flat), device=flat.device)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])

    def tiles(block: int) -> Tiles:
        needed = -(-(ends - begins) // block)
        expert = torch.repeat_interleave(needed)
        number = len(expert)
        before = (needed.cumsum(0) - needed)[expert]
        first = begins[expert] + (torch.arange(number, device=flat.device) - before) * block
        table = torch.stack([expert, first], 1).reshape(-1)
        return Tiles(torch.cat([table, table.new_tensor([number, 0])]).int(), number, block)

    position = torch.where(flat < E, position, -1)
    return Route(order.int(), position.int(), ends.int(), tiles(small), tiles(large), len(flat))


def _check_routing(index: Tensor, E: int, tiles: tuple[int, int]) -> None:
    """Raises ArithmeticError where `routing.route` finds something else than torch."""
    found, expected = route(index, E, *tiles), _sorted(index, E, *tiles)
    here = int(expected.offs[-1])
    pairs = [(found.order[:here], expected.order[:here]), (found.position[: found.rows], expected.position)]
    pairs += [(found.offs, expected.offs)]
    for ours, theirs in ((found.small, expected.small), (found.large, expected.large)):
        count = 2 * theirs.limit
        pairs += [(ours.table[:count], theirs.table[:count]), (ours.table[2 * ours.limit], theirs.table[count])]
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        raise ArithmeticError(f"the rows of {E} experts are sorted wrongly")


class _Drawn:
    """Random tensors of a kind, the same at every trial."""

    def __init__(self, device: torch.device, kind: Kind) -> None:
        self.generator, self.device, self.kind = torch.Generator(device).manual_seed(0), device, kind

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of about 1 in norm along the last axis."""
        drawn: Tensor = torch.randn(shape, generator=self.generator, device=self.device) / shape[-1] ** 0.5
        return drawn.to(dtype)

    def one_of(self, values: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        at = torch.randint(len(values), shape, generator=self.generator, device=self.device)
        return torch.tensor(values, device=self.device)[at]

    def index(self, T: int, experts: Sequence[int]) -> Tensor:
        """ "T k"."""
        return self.one_of(experts, (T, self.kind.k)).to(self.kind.dtypes[1])

    def held(self, of: Held, K: int, N: int, mean: Tensor | None = None) -> HeldProjection:
        """A projection; with `mean`, the mean of its rows "K", one whose results lie around `_CENTRES`."""
        E = self.kind.sizes[0]
        exact = self.floats(E, N, K)
        if mean is not None:
            exact = 0.15 * exact + self.one_of(_CENTRES, (E, N, 1)) * mean / K
        stored = (exact if of.along_in else exact.mT).to(self.kind.dtypes[3])
        weight = stored.contiguous() if of.packed else functional.pad(stored, (0, 8))[..., :-8]
        bias = None if of.bias is None else self.floats(E, N, dtype=of.bias)
        lora: ExpertLora | FlatLora | None = None
        if of.lora is not None:
            r, orientation, packing, of_A, of_B = of.lora
            if orientation:
                p, q = (N, K) if orientation == "reversed" else (K, N)
                A, B = self.floats(E * r, p, dtype=of_A), E**0.5 * self.floats(q, r * E, dtype=of_B)
                lora = FlatLora(A.requires_grad_(), B.requires_grad_(), E, r, orientation, packing, _SCALING)
            else:
                A, B = self.floats(E, r, K, dtype=of_A), self.floats(E, N, r, dtype=of_B)
                lora = ExpertLora(A.requires_grad_(), B.requires_grad_(), _SCALING)
        return weight.mT if of.along_in else weight, bias, lora


def _pairs(
    kind: Kind, drawn: _Drawn, routed: tuple[Tensor, Tensor, Tensor], up: HeldProjection, down: HeldProjection
) -> list[tuple[Tensor, Tensor]]:
    """What the kernels find, and what it should be: the output, and the gradients where the layer trains."""
    hidden, index, weights = routed
    known = kind.nonlinearity or Nonlinearity("silu", kind.gated)
    dense = partial(_function, known)
    expected = _dense(dense, routed, up, down)
    of_up, of_down = Projection.of(*up), Projection.of(*down)
    if kind.tiles is None:
        with torch.no_grad():
            out = few_rows(known, hidden, index, weights, of_up, of_down)
        return [(out, expected)]
    function = dense if kind.nonlinearity is None else known
    where = _sorted(index, kind.sizes[0], *kind.tiles)
    with torch.no_grad():
        out, passed, of_up, of_down = forward_pass(function, hidden, weights, where, of_up, lambda: of_down)
    if not kind.trains:
        return [(out, expected)]
    wanted = *of_up[2:4], *of_down[2:4]
    # Along the output, so that no router's gradient is what is left of terms that cancel.
    gradient = (expected.detach() / expected.detach().std() + hidden.shape[1] ** 0.5 * drawn.floats(*hidden.shape)).to(
        hidden
    )
    leaves = [hidden, weights, *(factor.tensor for factor in wanted if factor)]
    exact = torch.autograd.grad(expected, leaves, gradient.float())
    with torch.no_grad():
        found = backward_pass(function, gradient, hidden, weights, where, passed, of_up, of_down, wanted, True)
    return [(out, expected), *zip([each for each in found if each is not None], exact, strict=True)]


def worst_error(device: torch.device, values: tuple[Any, ...], rows: int) -> float:
    """The largest difference of the output or of any gradient, over that tensor's largest entry.

    Raises ArithmeticError where that many rows are sorted wrongly, and whatever a kernel raises that cannot be built.

    Args:
        values: Of the kind, from `kind_of`.
    """
    kind = Kind.of(values)
    drawn = _Drawn(device, kind)
    if kind.tiles is not None:
        num_experts = kind.steps[0]
        _check_routing(drawn.index(-(-rows // kind.k), range(num_experts + 1)), num_experts, kind.tiles)
    (E, H, I), (of_hidden, _, of_weights, _) = kind.sizes, kind.dtypes
    # Two and a half of the larger tiles. 60 % of the rows go to one expert, which makes a full tile and a ragged one;
    # none to another where there are four, and some to those of another rank.
    fewest = kind.tiles[1] * 5 // 2 if kind.tiles else _DECODED_ROWS
    T = 1 if kind.sparse else -(-fewest // kind.k)
    index = drawn.index(T, [0] * 12 + [E - 1] * 5 + [1 % E] * 2 + [E])
    index[0, 0] = 0
    mean = drawn.one_of([-1.0, 1.0], (H,))
    hidden = (mean + 0.25 * H**0.5 * drawn.floats(T, H)).to(of_hidden).requires_grad_()
    weights = drawn.floats(T, kind.k, dtype=of_weights).abs().requires_grad_()
    up, down = drawn.held(kind.up, H, 2 * I if kind.gated else I, mean), drawn.held(kind.down, I, H)
    pairs = _pairs(kind, drawn, (hidden, index, weights), up, down)
    with torch.no_grad():
        errors = [(found.float() - exact).abs().max() / exact.abs().max() for found, exact in pairs]
        return torch.stack(errors).max().item()
