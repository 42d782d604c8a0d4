"""The canonical form of an expert LoRA, and the way between it and PEFT's flat lora_A / lora_B. Pure tensor code.

Legend of the letters in every shape of this package:
    E  experts of one stack            T  tokens
    r  LoRA rank of one expert         k  experts a token is routed to
    in, out  true in- and out-features S  = T * k routed rows, sorted by expert
    (a b)  one flat axis, b fastest    d1, d2  the stored axes of an expert parameter (E, d1, d2)

Canonical: A "E r in", B "E out r", scaling s; expert e adds s * B[e] @ A[e] to its "out in" weight.

Flat, as PEFT stores it: lora_A.weight "(E r) p" and lora_B.weight "q (r E)".
    orientation  "linear": p = in, q = out.  "reversed": p = out, q = in.
    packing      of lora_B's columns. "rank_major": "(r E)", every PEFT release.
                 "grouped": "(E r)", Unsloth before 2026-09 and one Megatron-Bridge exporter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LayoutError

__all__ = [
    "ORIENTATIONS",
    "PACKINGS",
    "ExpertLora",
    "Factor",
    "FlatLora",
    "MixedLora",
    "common_dtype",
    "concat",
    "flat",
    "from_flat",
    "mix",
    "relative",
    "to_flat",
]

ORIENTATIONS = ("linear", "reversed")
PACKINGS = ("rank_major", "grouped")


class Factor(NamedTuple):
    """A or B of an expert stack for code that reads it by address: "E r d", d over features.

    Its fields are what a kernel takes of it after its own arguments, in their order.

    Attributes:
        tensor: Of any shape; the numbers fill its memory without gaps, so that `empty_like` has a place for each.
        rank: r.
        stride_e, stride_r, stride_d: Elements from one expert, one rank, one feature to the next.
        scaling: Of the update, in B; 1.0 in A.
    """

    tensor: Tensor
    rank: int
    stride_e: int
    stride_r: int
    stride_d: int
    scaling: float = 1.0


@dataclass(frozen=True)
class ExpertLora:
    """LoRA factors of one expert stack.

    Attributes:
        A: "E r in".
        B: "E out r".
        scaling: Factor of the update, alpha / r or alpha / sqrt(r).
        dropout: (ranks, probability) of each run of ranks whose input is dropped by a mask of its own; empty for none.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    dropout: tuple[tuple[int, float], ...] = ()

    @property
    def num_experts(self) -> int:
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def in_features(self) -> int:
        return self.A.shape[2]

    @property
    def out_features(self) -> int:
        return self.B.shape[1]

    def has_data(self) -> bool:
        return not (self.A.is_meta or self.B.is_meta)

    def delta(self) -> Tensor:
        """The per-expert update, scaling * B @ A: "E out in"."""
        return torch.bmm(self.B, self.A) * self.scaling

    def canonical(self) -> ExpertLora:
        return self

    def factors(self) -> tuple[Factor, Factor]:
        """A and B by address, in tensors through which gradients reach them."""
        (_, r, d), out = self.A.shape, self.B.shape[1]
        return (
            Factor(self.A.contiguous(), r, r * d, d, 1),
            Factor(self.B.contiguous(), r, out * r, 1, r, float(self.scaling)),
        )

    def check(self, num_experts: int, out_features: int, in_features: int, *what: str) -> None:
        """Raises `LayoutError` unless the factors fit a stack of that many experts, out- and in-features.

        Args:
            what: What the stack is called; several are put together by dots.
        """
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        if A == (num_experts, self.rank, in_features) and B == (num_experts, out_features, self.rank):
            return
        named = ".".join(what) or "the expert parameter"
        raise LayoutError(
            f"The LoRA factors do not fit {named}: A 'E r in' is {A} and B 'E out r' is {B}, but the weight has "
            f"E={num_experts}, out={out_features}, in={in_features}. Was the adapter made under another PEFT release "
            "(its layout may be flipped), for another model, or was ParamWrapper.update_layer patched "
            "(transformers 5.0 to 5.12 do so in model.load_adapter)?"
        )


class FlatLora(NamedTuple):
    """One adapter of an expert stack as PEFT packs it, known to be possible; made by `flat`.

    It answers as the `ExpertLora` that `canonical` makes of it does, by arithmetic instead of views: a forward that
    reads factors by address pays for none.

    Attributes:
        lora_A, lora_B, num_experts, orientation, packing, scaling: As `flat` takes them.
        rank: r.
        dropout: As in `ExpertLora`.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    num_experts: int
    rank: int
    orientation: str
    packing: str
    scaling: float
    dropout: tuple[tuple[int, float], ...] = ()

    def has_data(self) -> bool:  # no property: torch 2.9 compiles none of a named tuple
        return not (self.lora_A.is_meta or self.lora_B.is_meta)

    def check(self, num_experts: int, out_features: int, in_features: int, *what: str) -> None:
        """As `ExpertLora.check`."""
        p, q = (in_features, out_features) if self.orientation == "linear" else (out_features, in_features)
        if (self.num_experts, self.lora_A.shape[1], self.lora_B.shape[0]) != (num_experts, p, q):
            self.canonical().check(num_experts, out_features, in_features, *what)

    def canonical(self) -> ExpertLora:
        """By views alone: no copy, and gradients flow back to the flat tensors."""
        E, r = self.num_experts, self.rank
        by_row = self.lora_A.reshape(E, r, self.lora_A.shape[1])  # "(E r) p -> E r p"
        if self.packing == "rank_major":
            by_column = self.lora_B.reshape(-1, r, E).permute(2, 0, 1)  # "q (r E) -> E q r"
        else:
            by_column = self.lora_B.reshape(-1, E, r).permute(1, 0, 2)  # "q (E r) -> E q r"
        if self.orientation == "linear":
            return ExpertLora(by_row, by_column, self.scaling, self.dropout)
        return ExpertLora(by_column.transpose(1, 2), by_row.transpose(1, 2), self.scaling, self.dropout)

    def factors(self) -> tuple[Factor, Factor]:
        """As `ExpertLora.factors`, in the flat tensors themselves."""
        E, r, scaling = self.num_experts, self.rank, float(self.scaling)
        lora_A, lora_B = self.lora_A.contiguous(), self.lora_B.contiguous()
        p = lora_A.shape[1]
        of_A = lora_A, r, r * p, p, 1  # "(E r) p"
        of_B = (lora_B, r, 1, E, E * r) if self.packing == "rank_major" else (lora_B, r, r, 1, E * r)  # "q (r E)"
        if self.orientation == "linear":
            return Factor(*of_A), Factor(*of_B, scaling)
        return Factor(*of_B), Factor(*of_A, scaling)


def _check_names(orientation: str, packing: str) -> None:
    if orientation not in ORIENTATIONS:
        raise LayoutError(f"orientation is {orientation!r}; one of {ORIENTATIONS} was expected.")
    if packing not in PACKINGS:
        raise LayoutError(f"packing is {packing!r}; one of {PACKINGS} was expected.")


def flat(
    lora_A: Tensor,
    lora_B: Tensor,
    num_experts: int,
    *,
    orientation: str,
    packing: str = "rank_major",
    scaling: float = 1.0,
) -> FlatLora:
    """PEFT's flat pair, once its shapes are known to be possible.

    Args:
        lora_A: "(E r) in", or "(E r) out" where reversed.
        lora_B: "out (r E)", or "in (r E)" where reversed; "(E r)" instead of "(r E)" where grouped.
        num_experts: E. 1 for a 2-D parameter.
        orientation: `"linear"` or `"reversed"`.
        packing: `"rank_major"` or `"grouped"`.
        scaling: As PEFT's `scaling[adapter_name]`.

    Raises:
        LayoutError: The shapes cannot be such a pair.
    """
    _check_names(orientation, packing)
    if num_experts < 1:
        raise LayoutError(f"num_experts is {num_experts}; an expert stack has at least 1.")
    if lora_A.ndim != 2 or lora_B.ndim != 2:
        raise LayoutError(
            f"lora_A and lora_B have shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}; two matrices, "
            "'(E r) p' and 'q (r E)', were expected. 3-D factors are canonical already: use ExpertLora(A, B)."
        )
    rows, columns = lora_A.shape[0], lora_B.shape[1]
    if rows != columns:
        raise LayoutError(
            f"lora_A has {rows} rows ('(E r) p') and lora_B has {columns} columns ('q (r E)'); both must be "
            f"E * r with E={num_experts}. Do the two tensors belong to the same adapter and parameter?"
        )
    if rows % num_experts or rows == 0:
        raise LayoutError(
            f"lora_A has {rows} rows ('(E r) p'), which {num_experts} experts cannot share evenly. "
            "Was the adapter trained with another num_experts?"
        )
    return FlatLora(lora_A, lora_B, num_experts, rows // num_experts, orientation, packing, scaling)


def from_flat(lora_A: Tensor, lora_B: Tensor, num_experts: int, **how: Any) -> ExpertLora:
    """The same as an `ExpertLora`, by views alone: no copy, and gradients flow back to the flat tensors."""
    return flat(lora_A, lora_B, num_experts, **how).canonical()


def to_flat(lora: ExpertLora, *, orientation: str, packing: str = "rank_major") -> tuple[Tensor, Tensor]:
    """The inverse of `from_flat`: (lora_A, lora_B), bit-identical, differentiable. The scaling is not folded in."""
    _check_names(orientation, packing)
    lora.check(lora.num_experts, lora.out_features, lora.in_features)
    if orientation == "linear":
        by_row, by_column = lora.A, lora.B
    else:
        by_row, by_column = lora.B.transpose(1, 2), lora.A.transpose(1, 2)
    lora_A = by_row.flatten(0, 1)  # "E r p -> (E r) p"
    if by_column.stride(1) == 1:
        # q is the fastest axis in memory: whole rows move, and what is left is a plain 2-D transpose, a view.
        order = (2, 0, 1) if packing == "rank_major" else (0, 2, 1)
        lora_B = by_column.permute(order).flatten(0, 1).t()  # "E q r -> (r E) q -> q (r E)", or "q (E r)"
    else:
        order = (1, 2, 0) if packing == "rank_major" else (1, 0, 2)
        lora_B = by_column.permute(order).flatten(1, 2)  # "E q r -> q (r E)", or "q (E r)"
    return lora_A, lora_B


def concat(loras: Sequence[ExpertLora]) -> ExpertLora:
    """Several updates of one stack as a single one: concatenated along the rank, scalings folded into B.

    One lone update comes back as it is. The sum of the updates is unchanged: `concat(l).delta() == sum(delta)`.

    Raises:
        LayoutError: No update at all, or the updates belong to stacks of different shapes.
    """
    if not loras:
        raise LayoutError("concat needs at least one ExpertLora.")
    first, *others = loras
    if not others:
        return first
    dtype = first.A.dtype
    for other in others:
        other.check(first.num_experts, first.out_features, first.in_features, "the stack of the first adapter")
        dtype = torch.promote_types(dtype, other.A.dtype)
    A = torch.cat([lora.A.to(dtype) for lora in loras], dim=1)
    B = torch.cat([lora.B.to(dtype) * lora.scaling for lora in loras], dim=2)
    runs = [run for lora in loras for run in lora.dropout or ((lora.rank, 0.0),)]
    return ExpertLora(A, B, 1.0, tuple(runs) if any(p for _, p in runs) else ())


@dataclass(frozen=True)
class MixedLora:
    """Several updates of one stack, of which each routed row meets one.

    It answers as its `lora` does. Made by `mix`.

    Attributes:
        lora: Of E * N experts, those of one expert side by side: A "(E N) r in", B "(E N) out r".
        dropout: "N", the probability of each update.
    """

    lora: ExpertLora
    dropout: tuple[float, ...]

    def has_data(self) -> bool:
        return self.lora.has_data()

    def canonical(self) -> ExpertLora:
        return self.lora

    def check(self, num_experts: int, out_features: int, in_features: int, *what: str) -> None:
        """As `ExpertLora.check`."""
        self.lora.check(num_experts * len(self.dropout), out_features, in_features, *what)


def mix(loras: Sequence[ExpertLora | None]) -> MixedLora | None:
    """N updates of one stack for rows that meet one each: padded to the largest rank, scalings folded into B.

    Args:
        loras: None for rows that meet no update.

    Returns:
        None where there is no update at all.

    Raises:
        LayoutError: The updates belong to stacks of different shapes.
    """
    found = [lora for lora in loras if lora is not None]
    if not found:
        return None
    first, rank = found[0], max(lora.rank for lora in found)
    for other in found[1:]:
        other.check(first.num_experts, first.out_features, first.in_features, "the stack of the first adapter")
    dtype = common_dtype(lora.A.dtype for lora in found)
    none = first.A.new_zeros(first.num_experts, 0, first.in_features)
    none_out = none.new_zeros(first.num_experts, first.out_features, 0)
    A, B, dropout = [], [], []
    for lora in (lora or ExpertLora(none, none_out) for lora in loras):
        pad = rank - lora.rank
        A.append(torch.nn.functional.pad(lora.A.to(dtype), (0, 0, 0, pad)))
        B.append(torch.nn.functional.pad(lora.B.to(dtype) * lora.scaling, (0, pad)))
        dropout.append(max((p for _, p in lora.dropout), default=0.0))
    stacked = ExpertLora(torch.stack(A, 1).flatten(0, 1), torch.stack(B, 1).flatten(0, 1))
    return MixedLora(stacked, tuple(dropout))


def relative(distance: float, norm: float) -> float:
    """A distance relative to the norm of what was expected; of anything to zero infinite, of zero to zero none."""
    if norm:
        return distance / norm
    return float("inf") if distance else 0.0


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one that holds all of them; float32 at least where float8 is among others, which torch does not promote."""
    found = set(dtypes)
    if len(found) > 1:
        found = {torch.float32 if dtype.itemsize == 1 else dtype for dtype in found}
    return reduce(torch.promote_types, found)
