"""What the kernels of a layer are compiled for, in one value: what a trial is asked of, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index as constant
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import ExpertLora, FlatLora
from ...model.packed import Codec, PackedWeight
from .decode import MOST_PACKED_ROWS, MOST_ROWS, most_rows
from .interface import HeldProjection, Nonlinearity
from .layer import any_trains, tile_sizes
from .packed_gemm import MANY
from .routing import steps

__all__ = ["Held", "Kind", "kind_of", "rows_of_every_kind"]


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


def _read(
    weight: Tensor | PackedWeight, bias: Tensor | None, lora: ExpertLora | FlatLora | None, compiling: bool
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """(what a `Held` is made of, the factors). The former: shape, (strides, whether it starts on 16 bytes) or the
    packed form, bias, LoRA."""
    form: tuple[Any, ...] | None = None
    factors: tuple[Tensor, ...] = ()
    if lora is not None:
        if isinstance(lora, FlatLora):
            factors, order = lora[:2], (lora.orientation, lora.packing)
        else:
            factors, order = (lora.A, lora.B), ("", "")
        form = (lora.rank, *order, factors[0].dtype, factors[1].dtype, bool(lora.dropout))
    stored: tuple[Any, ...]
    if isinstance(weight, PackedWeight):
        stored = weight.codec, weight.stored, weight.rows_are_in
    else:  # a graph's tensors have no address yet
        stored = weight.stride(), compiling or weight.data_ptr() % 16 == 0
    return (weight.shape, stored, None if bias is None else bias.dtype, form), factors


def _held(shape: Sequence[int], stored: tuple[Any, ...], bias: torch.dtype | None, lora: Any) -> tuple[Any, ...]:
    """`Held` as a tuple."""
    lora = lora and (constant(lora[0]), *lora[1:])
    if isinstance(stored[0], Codec):
        codec, (_, *sizes), rows_are_in = stored
        if codec.height:
            height, width = (-1 if block >= n else block for block, n in zip(codec[2:4], sizes, strict=True))
            codec = codec._replace(height=height, width=width)
        return not rows_are_in, True, bias, lora, tuple(map(constant, codec))
    (_, K, N), (stride, aligned) = shape, stored
    along_in = stride[1] == 1
    packed = tuple(stride) == ((K * N, 1, K) if along_in else (K * N, N, 1))
    return along_in, packed and aligned, bias, lora, None


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
    known = tuple(nonlinearity[:3]) if isinstance(nonlinearity, Nonlinearity) else None
    compiling = torch.compiler.is_compiling()
    (of_up, up_factors), (of_down, down_factors) = _read(*up, compiling), _read(*down, compiling)
    trains = any_trains((hidden, weights, *up_factors, *down_factors))
    dtypes = hidden.dtype, index.dtype, weights.dtype, up[0].dtype
    make = _kind if compiling or type(rows) is not int else _known_kind  # a symbol has no hash
    return make(dtypes, index.shape[1], known, trains, most_rows(up[0], down[0]), of_up, of_down, rows)


def _kind(
    dtypes: tuple[torch.dtype, ...], k: int, known: tuple[Any, ...] | None, trains: bool, most: int,
    up: tuple[Any, ...], down: tuple[Any, ...], rows: int,
) -> tuple[Any, ...]:  # fmt: skip
    E, H, N, I, k = map(constant, (*up[0], down[0][1], k))
    held_up, held_down = _held(*up), _held(*down)
    drops = any(lora is not None and lora[-1] for lora in (up[3], down[3]))
    packed = held_up[-1] is not None or held_down[-1] is not None
    few = rows <= most and known is not None and not (trains or drops)
    return (
        dtypes,
        (_reduced(E, max(4, k + 1), 16), _reduced(H, 576, 64), _reduced(I, 576, 64)),
        k,
        known,
        N != I,
        held_up,
        held_down,
        trains,
        None if few else tile_sizes(rows, E),
        not few and rows < E,
        max(least * (rows >= least * E) for least in (0, *MANY)) if packed else 0,
        () if few else (E, *steps(rows, E)),
    )


_known_kind = lru_cache(1024)(_kind)  # a forward asks for it each time


def rows_of_every_kind(E: int, k: int, packed: bool) -> list[int]:
    """Numbers of rows, one at least for every size of tiles: for a graph, which does not know its own."""
    E, k = constant(E), constant(k)
    return [k, MOST_PACKED_ROWS + 1, MOST_ROWS + 1, E, 4 * E, 16 * E, 64 * E, *[least * E for least in MANY if packed]]
