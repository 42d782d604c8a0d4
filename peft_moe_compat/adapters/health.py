"""What the numbers of a LoRA show that its sizes do not: what is zero, not finite, or far from its neighbours.

Pure tensor code. Training leaves lora_A nowhere zero, since it starts at random, and lora_B zero only where no token
came by; a copy that lost rows, columns or experts leaves zeros in a pattern. Experts of one projection are updated in
like measure, so the norms of their updates lie within a few powers of ten of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..layout import ExpertLora, common_dtype

__all__ = ["Numbers", "examine", "far", "findings", "gaps", "not_finite"]

# Of log norms: robust standard deviations from the median, and the factor from it, upwards and downwards, that count
# as far. Adam moves every entry alike, whatever its gradient; an expert that few tokens reached moves less.
_DEVIATIONS, _ABOVE, _BELOW = 8.0, 30.0, 3000.0
_FEWEST = 4  # that a median says something of
_MOST_RANKS = 512  # whose Gram matrices cost no more than reading the factors does
_SPARSE = 4  # one in so many of an expert's rows
_AT_ONCE = 2**22  # entries of a factor
# Entries from which on a factor of one number is no chance: the first step of Adam moves all of lora_B by one distance,
# and only the signs of their gradients tell its entries apart.
_MANY = 32
# A weight's entries are below 10, and their rows' norms below 10^3. Adam moves an entry by the learning rate in a step.
_LARGEST = 1e6


@dataclass(frozen=True)
class Numbers:
    """What one projection's factors hold.

    Attributes:
        nan, infinite: How many entries of both factors.
        zero_A, zero_B: "E": the experts whose lora_A or lora_B, as PEFT has them, is all zero.
        zero_rows: "out": how many of the experts with an update have that row of it all zero.
        rows_without: "E": how many rows of the update are all zero.
        zero_columns: "in": whether every expert with an update has that column of it all zero.
        lost_ranks: "E": how many ranks have lora_A zero and lora_B not, which training never makes.
        unused_ranks: "E": of an expert with an update, how many ranks have lora_B zero and lora_A not.
        constant: "E": the experts of whose factors one is the same number, and not zero, throughout.
        largest: Norm of the largest row of a factor that is finite, times the scaling where that is above 1.
        alike: The experts whose factors have the norms of another one's in every row, which no two trained ones have.
        norms: "E", float64: of each expert's update; empty where the rank is too large for it to be cheap.
    """

    nan: int
    infinite: int
    zero_A: Tensor  # noqa: N815
    zero_B: Tensor  # noqa: N815
    zero_rows: Tensor
    rows_without: Tensor
    zero_columns: Tensor
    lost_ranks: Tensor
    unused_ranks: Tensor
    constant: Tensor
    largest: float
    alike: tuple[int, ...]
    norms: Tensor


def examine(lora: ExpertLora, is_reversed: bool = False) -> Numbers:
    """Looks at every number of a projection, a few experts at a time.

    Args:
        lora: The factors in canonical form.
        is_reversed: Whether lora_A, which starts at random, is the canonical B, and lora_B the canonical A.
    """
    nan = infinite = 0
    largest = 0.0
    rows = torch.zeros(lora.out_features, dtype=torch.int64)
    columns = torch.ones(lora.in_features, dtype=torch.bool)
    per_expert: list[tuple[Tensor, ...]] = []
    same: dict[tuple[bytes, bytes], list[int]] = {}
    seen = 0
    for few in _few(lora):
        (A, of_A), (B, of_B) = map(_rows, few)  # "E r", "E out"
        for factor, norms in ((A, of_A), (B, of_B)):
            if not bool(norms.isfinite().all()):
                of_factor = not_finite(factor)
                nan, infinite = nan + of_factor[0], infinite + of_factor[1]
            largest = max(largest, float(norms.where(norms.isfinite(), 0).max()))
        ranks = of_A == 0, torch.linalg.vector_norm(B, dim=1) == 0  # "E r"
        first, second = reversed(ranks) if is_reversed else ranks
        updated = ~(first.all(1) | second.all(1))
        without = of_B == 0
        rows += without[updated].sum(0)
        for expert in updated.nonzero().flatten().tolist():
            if not bool(columns.any()):  # as a rule after the first
                break
            columns &= (A[expert] == 0).all(0)
        rows_of_A, rows_of_B = of_A.numpy(), of_B.numpy()
        for expert in updated.nonzero().flatten().tolist():
            key = rows_of_A[expert].tobytes(), rows_of_B[expert].tobytes()
            same.setdefault(key, []).append(seen + expert)
        seen += len(A)
        lost, unused = (first & ~second).sum(1), (second & ~first).sum(1) * updated
        norms = _norms(A, B) * abs(lora.scaling)
        constant = _is_constant(A) | _is_constant(B)
        per_expert.append((first.all(1), second.all(1), without.sum(1), lost, unused, constant, norms))
    first, second, without, lost, unused, constant, norms = (
        torch.cat(parts) for parts in zip(*per_expert, strict=True)
    )
    shared = lora.A.stride(0) == lora.B.stride(0) == 0  # one pair for all, and written as one
    alike = tuple(sorted(e for group in same.values() if len(group) > 1 and not shared for e in group))
    largest *= max(1.0, abs(lora.scaling))
    return Numbers(nan, infinite, first, second, rows, without, columns, lost, unused, constant, largest, alike, norms)


def _rows(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The factor and the norms of its rows; in float64 where squares leave float32's range before the numbers do."""
    norms = torch.linalg.vector_norm(factor, dim=2)
    if factor.dtype != torch.float64 and not bool((norms.isfinite() & (norms > 0)).all()):
        return _rows(factor.double())
    return factor, norms


def _is_constant(factor: Tensor) -> Tensor:
    """ "E": of which experts the factor is the same number, and not zero, throughout."""
    first = factor[:, :1, :1]
    # As a rule the first row, or column, tells.
    found = (factor[:, :1] == first).all(2)[:, 0] & (factor[:, :, :1] == first).all(1)[:, 0] & (first != 0)[:, 0, 0]
    if factor[0].numel() < _MANY:
        return torch.zeros_like(found)
    for expert in found.nonzero().flatten().tolist():
        found[expert] = bool((factor[expert] == first[expert]).all())
    return found


def not_finite(tensor: Tensor) -> tuple[int, int]:
    """How many entries are NaN, and how many infinite; of any dtype and shape."""
    nan = infinite = 0
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    for part in torch.split(real.reshape(-1), _AT_ONCE):
        wide = part.float() if part.is_floating_point() else part
        nan, infinite = nan + int(wide.isnan().sum()), infinite + int(wide.isinf().sum())
    return nan, infinite


def _few(lora: ExpertLora) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of a few experts after the other, in float32 at least."""
    size = max(lora.rank * max(lora.in_features, lora.out_features), 1)
    for first in range(0, lora.num_experts, step := max(1, _AT_ONCE // size)):
        few = (factor[first : first + step] for factor in (lora.A, lora.B))
        A, B = (factor.to(common_dtype({factor.dtype, torch.float32})).contiguous() for factor in few)
        yield A, B.to(A.dtype)


def _norms(A: Tensor, B: Tensor) -> Tensor:
    """The norm of B @ A, from "r r" matrices: |B A|^2 = trace((B^T B) (A A^T))."""
    if A.shape[1] > _MOST_RANKS:
        return A.new_empty(0, dtype=torch.float64)
    grams = (A @ A.transpose(1, 2)).double(), (B.transpose(1, 2) @ B).double()
    norms = (grams[0] * grams[1]).sum((1, 2)).clamp(min=0).sqrt()
    if {A.dtype, B.dtype} != {torch.float64} and not bool((norms.isfinite() & (norms > 0)).all()):
        return _norms(A.double(), B.double())
    return norms


def far(norms: Sequence[float]) -> list[int]:
    """Which of the norms are far from the others, by their median; none where they are too few to tell."""
    logs = torch.tensor(norms, dtype=torch.float64).log()
    known = logs.isfinite()
    if int(known.sum()) < _FEWEST:
        return []
    distances = logs - logs[known].quantile(0.5)
    spread = 1.4826 * float(distances[known].abs().quantile(0.5))
    margins = torch.where(distances > 0, torch.tensor(_ABOVE).log(), torch.tensor(_BELOW).log())
    outside = known & (distances.abs() > margins.clamp(min=_DEVIATIONS * spread))
    return [int(index) for index in outside.nonzero()]


def findings(numbers: Numbers, halves: Sequence[bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(code, detail) of everything in a projection that is not as training leaves it.

    Args:
        numbers: What `examine` found.
        halves: Of gate_up, whether gate and up rows alternate, or both where that is not known; else nothing.
    """
    if numbers.nan or numbers.infinite:
        yield "not_finite", {"nan": numbers.nan, "infinite": numbers.infinite}
    if numbers.largest > _LARGEST:
        yield "huge", {"largest": float(f"{numbers.largest:.2g}")}
    if bool(numbers.constant.any()):
        these = numbers.constant
        yield "constant_experts", {"experts": _which(these), "count": int(these.sum()), "of": len(these)}
    experts, updated = len(numbers.zero_A), ~(numbers.zero_A | numbers.zero_B)
    untrained = numbers.zero_B & ~numbers.zero_A
    if bool(untrained.all()):
        yield "not_trained", {}
        return
    for code, these in (("zero_experts", numbers.zero_A), ("untrained_experts", untrained)):
        if bool(these.any()):
            yield code, {"experts": _which(these), "count": int(these.sum()), "of": experts}
    if not bool(updated.any()):
        return
    empty, columns = numbers.zero_rows == updated.sum(), numbers.zero_columns
    half = next((half for way in halves if (half := _empty_half(empty, way)) is not None), None)
    if half is not None:
        yield "zero_half", {"half": half}
    elif bool(empty.any()):
        yield "zero_rows", {"count": int(empty.sum()), "of": len(empty)}
    sparse = updated & ((numbers.rows_without - empty.sum()) * _SPARSE >= len(empty))
    if bool(sparse.any()):
        yield "sparse_experts", {"experts": _which(sparse), "count": int(sparse.sum()), "of": experts}
    if bool(columns.any()):
        yield "zero_columns", {"count": int(columns.sum()), "of": len(columns)}
    if bool((lost := (numbers.lost_ranks > 0) & ~numbers.zero_A).any()):
        yield "lost_ranks", {"experts": _which(lost), "count": int(lost.sum()), "of": experts}
    if bool((unused := numbers.unused_ranks > 0).any()):
        yield "unused_ranks", {"experts": _which(unused), "count": int(unused.sum()), "of": experts}
    if numbers.alike:
        yield "same_experts", {"experts": list(numbers.alike), "count": len(numbers.alike), "of": experts}
    if outside := far(numbers.norms.tolist()):
        median = float(numbers.norms[numbers.norms > 0].quantile(0.5))
        ratios = [float(f"{numbers.norms[index] / median:.2g}") for index in outside]
        yield "far_experts", {"experts": outside, "count": len(outside), "of": experts, "ratios": ratios}


def _which(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero()]


def _empty_half(empty: Tensor, interleaved: bool) -> str | None:
    """`"gate"` or `"up"`, where the rows of that one are zero and the other's are not all."""
    if len(empty) % 2:
        return None
    halves = empty.view(-1, 2).T if interleaved else empty.view(2, -1)
    found = [name for name, half in zip(("gate", "up"), halves, strict=True) if bool(half.all())]
    return found[0] if len(found) == 1 else None


def gaps(layers: Sequence[int]) -> list[int]:
    """The layers missing in the middle of those given, where they otherwise follow each other at one distance.

    Of three layers the middle one is missed: two alone show no distance.
    """
    there = sorted(set(layers))
    if len(there) == 2 and there[1] - there[0] == 2:
        return [there[0] + 1]
    steps = [after - before for before, after in pairwise(there)]
    step = min(steps, default=1)
    wider = [wide for wide in steps if wide > step]
    # What is irregular was chosen so, or is the model's own pattern; of few layers, one that is missing is not.
    if (wider != [2 * step] and len(wider) * 4 > len(steps)) or any(wide % step for wide in wider):
        return []
    return sorted(set(range(there[0], there[-1] + 1, step)) - set(there)) if there else []
