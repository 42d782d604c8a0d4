"""Parts of an experts module turned into other parts: gate and up joined or parted, ranks padded, scalings folded.

Each function takes `Part`s that have not been read and returns such ones; the work happens when they are loaded. All
of it runs on meta tensors too, which is how a conversion knows what it will write before it reads anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..layout import ExpertLora, common_dtype
from .parts import Part, times
from .steps import Step

__all__ = ["alternating", "folded", "join", "part_gate_up", "zeros_like"]


def _rank_alpha(alpha: float, rank: int, new_rank: int, rslora: bool) -> float:
    """The alpha that keeps the scaling when the rank changes: alpha / r, or alpha / sqrt(r) under rsLoRA."""
    return alpha * (sqrt(new_rank / rank) if rslora else new_rank / rank)


def _rows(out_features: int, interleaved: bool) -> tuple[slice, slice]:
    """Of gate and of up, among the rows of gate_up_proj."""
    half = out_features // 2
    return (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))


def alternating(part: Part) -> Part:
    """gate_up with gate and up rows in turn, as gpt_oss has them; per-expert files (ms-swift) have gate, then up."""
    if part.role != "gate_up":
        return part

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        lora = part.load(tensors)
        gate, up = lora.B.chunk(2, dim=1)
        return ExpertLora(lora.A, torch.stack((gate, up), dim=2).flatten(1, 2), lora.scaling)

    return replace(part, load=load)


def part_gate_up(part: Part, interleaved: bool, joined: tuple[int, int] | None, rslora: bool) -> tuple[Part, Part]:
    """gate_up as gate and up. Both get its lora_A, or the ranks of their own where the two were once joined.

    Args:
        part: With the role gate_up.
        interleaved: Whether gate and up rows alternate.
        joined: Ranks of gate and up, where a conversion joined them block-diagonally.
        rslora: Whether scalings are alpha / sqrt(r).
    """

    def side(role: str) -> Part:
        second = role == "up"

        def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
            whole = part.load(tensors)
            B = whole.B[:, _rows(whole.out_features, interleaved)[second]]
            if joined is None:
                return ExpertLora(whole.A, B, whole.scaling)
            if sum(joined) != whole.rank:
                raise AdapterFileError(
                    f"The stamp says that {part.path!r} joins ranks {joined}, but its rank is {whole.rank}. Was the "
                    "file edited?"
                )
            ranks, others = slice(0, joined[0]), slice(joined[0], None)
            if second:
                ranks, others = others, ranks
            if whole.has_data() and B[:, :, others].any():
                raise AdapterFileError(
                    f"The stamp says that {part.path!r} joins ranks {joined} block-diagonally, but {role} has values "
                    "in the ranks of the other. Was the file edited? Save it again with PEFT, which drops the stamp."
                )
            return ExpertLora(whole.A[:, ranks], B[:, :, ranks], whole.scaling)

        alpha = part.alpha if joined is None else _rank_alpha(part.alpha, sum(joined), joined[second], rslora)
        return replace(part, name=role, role=role, load=load, alpha=alpha, joined=None)

    return side("gate"), side("up")


def join(sides: Mapping[str, Part], same_A: bool, interleaved: bool, rslora: bool) -> Part:
    """gate and up as gate_up: with the lora_A of both, or else with a block-diagonal lora_B.

    Args:
        sides: `"gate"` and `"up"`, in that order. One of them may be missing: its rows stay zero.
        same_A: Whether both have the same lora_A, bit for bit; then they share it.
        interleaved: Whether gate and up rows alternate in gate_up_proj.
        rslora: Whether scalings are alpha / sqrt(r).
    """
    metas = {role: part.meta for role, part in sides.items()}
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    lead = next((role for role in sides if metas[role].scaling), next(iter(sides)))
    ratios = {role: lora.scaling / (metas[lead].scaling or 1.0) for role, lora in metas.items()} | {lead: 1.0}
    folded = set(ratios.values()) != {1.0}
    shared = len(sides) == 1 or (same_A and not folded)
    joined = None if shared else (metas["gate"].rank, metas["up"].rank)
    rank = sum(joined) if joined else metas[lead].rank
    rows = dict(zip(("gate", "up"), _rows(2 * metas[lead].out_features, interleaved), strict=True))

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        loras = {role: part.load(tensors) for role, part in sides.items()}
        of_both = common_dtype({lora.A.dtype for lora in loras.values()})
        A = loras[lead].A if shared else torch.cat([lora.A.to(of_both) for lora in loras.values()], dim=1)
        factors = {role: times(lora.B, ratios[role]) for role, lora in loras.items()}
        dtype = common_dtype({B.dtype for B in factors.values()})
        whole = A.new_zeros(A.shape[0], 2 * loras[lead].out_features, rank, dtype=dtype)
        for role, B in factors.items():
            first = joined[0] if joined and role == "up" else 0
            whole[:, rows[role], first : first + B.shape[2]] = B
        return ExpertLora(A, whole, loras[lead].scaling)

    steps = [step for part in sides.values() for step in part.steps]
    if joined:
        steps.append(Step("joined", joined))
    if folded:
        steps.append(Step("join_folded"))
    slots = tuple(slot for part in sides.values() for slot in part.slots)
    alpha = _rank_alpha(sides[lead].alpha, metas[lead].rank, rank, rslora)
    return Part(sides[lead].path, "gate_up", "gate_up", alpha, slots, load, tuple(steps), joined)


def folded(part: Part, factor: float, rank: int, alpha: float) -> Part:
    """The same update with lora_B times `factor` and the scaling divided by it, zeros up to `rank`, and that alpha."""
    if factor == 1 and rank == part.meta.rank:
        return part if part.alpha == alpha else replace(part, alpha=alpha)

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        lora = part.load(tensors)
        A, B = lora.A, times(lora.B, factor)
        if rank > lora.rank:  # torch's own padding knows no float8 on the meta device
            narrow = A, B
            A = A.new_zeros(lora.num_experts, rank, lora.in_features)
            B = B.new_zeros(lora.num_experts, lora.out_features, rank)
            A[:, : lora.rank], B[:, :, : lora.rank] = narrow
        return ExpertLora(A, B, lora.scaling / factor if factor else lora.scaling)

    return replace(part, load=load, alpha=alpha)


def zeros_like(part: Part, role: str, in_features: int, out_features: int) -> Part:
    """A part that changes nothing, with the experts, rank, dtype and scaling of another one."""

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        lora = part.load(tensors)
        A = lora.A.new_zeros(lora.num_experts, lora.rank, in_features)
        return ExpertLora(A, lora.B.new_zeros(lora.num_experts, out_features, lora.rank), lora.scaling)

    return replace(part, name=role, role=role, load=load, steps=())
