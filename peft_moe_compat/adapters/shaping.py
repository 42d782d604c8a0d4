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
from ..layout import ExpertLora
from .parts import Load, Part
from .steps import Step

__all__ = ["alternating", "folded", "join", "part_gate_up", "rank_alpha", "zeros_like"]


def rank_alpha(alpha: float, rank: int, new_rank: int, rslora: bool) -> float:
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

    def load(side: int) -> Load:
        def loaded(tensors: Mapping[str, Tensor]) -> ExpertLora:
            whole = part.load(tensors)
            B = whole.B[:, _rows(whole.out_features, interleaved)[side]]
            if joined is None:
                return ExpertLora(whole.A, B, whole.scaling)
            if sum(joined) != whole.rank:
                raise AdapterFileError(
                    f"The stamp says that {part.path!r} joins ranks {joined}, but its rank is {whole.rank}. Was the "
                    "file edited?"
                )
            ranks = slice(0, joined[0]) if side == 0 else slice(joined[0], None)
            return ExpertLora(whole.A[:, ranks], B[:, :, ranks], whole.scaling)

        return loaded

    def alpha(side: int) -> float:
        return part.alpha if joined is None else rank_alpha(part.alpha, sum(joined), joined[side], rslora)

    gate = replace(part, name="gate", role="gate", load=load(0), alpha=alpha(0))
    up = replace(part, name="up", role="up", load=load(1), alpha=alpha(1))
    return gate, up


def join(
    gate: Part | None, up: Part | None, metas: Mapping[str, ExpertLora], same_A: bool, interleaved: bool, rslora: bool
) -> tuple[Part, tuple[int, int] | None]:
    """gate and up as gate_up, and their ranks where that took a block-diagonal lora_B.

    Args:
        gate, up: One of them may be missing: its rows stay zero.
        metas: `"gate"` and `"up"` -> the factors, on the meta device.
        same_A: Whether both have the same lora_A, bit for bit; then they share it.
        interleaved: Whether gate and up rows alternate in gate_up_proj.
        rslora: Whether scalings are alpha / sqrt(r).
    """
    sides = {name: part for name, part in (("gate", gate), ("up", up)) if part is not None}
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    lead_name = next((name for name in sides if metas[name].scaling), next(iter(sides)))
    lead = sides[lead_name]
    ratios = {name: metas[name].scaling / (metas[lead_name].scaling or 1.0) for name in sides}
    ratios[lead_name] = 1.0
    shared = len(sides) == 1 or (same_A and set(ratios.values()) == {1.0})
    ranks = {name: metas[name].rank for name in sides}
    rank = ranks[lead_name] if shared else sum(ranks.values())
    half = metas[lead_name].out_features

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        loaded = {name: part.load(tensors) for name, part in sides.items()}
        A = loaded[lead_name].A if shared else torch.cat([lora.A for lora in loaded.values()], dim=1)
        factors = {name: _times(lora.B, ratios[name]) for name, lora in loaded.items()}
        dtype = factors[lead_name].dtype
        for B in factors.values():
            dtype = torch.promote_types(dtype, B.dtype)
        whole = A.new_zeros(A.shape[0], 2 * half, rank, dtype=dtype)
        first = 0
        for name, B in factors.items():
            columns = slice(None) if shared else slice(first, first + ranks[name])
            whole[:, _rows(2 * half, interleaved)[name == "up"], columns] = B
            first += ranks[name]
        return ExpertLora(A, whole, loaded[lead_name].scaling)

    steps = tuple(step for part in sides.values() for step in part.steps)
    if not shared:
        steps += (Step("joined", (ranks["gate"], ranks["up"])),)
    if set(ratios.values()) != {1.0}:
        steps += (Step("join_folded"),)
    reads = tuple(dict.fromkeys(name for part in sides.values() for name in part.reads))
    alpha = rank_alpha(lead.alpha, ranks[lead_name], rank, rslora)
    part = Part(lead.path, "gate_up", "gate_up", alpha, reads, load, steps)
    return part, (ranks["gate"], ranks["up"]) if not shared else None


def _times(B: Tensor, factor: float) -> Tensor:
    """B times a factor; in float32 at least, unless the factor is 1."""
    return B if factor == 1 else B.to(torch.promote_types(B.dtype, torch.float32)) * factor


def folded(part: Part, factor: float, rank: int | None = None) -> Part:
    """The same update with lora_B times `factor` and the scaling divided by it, and zeros up to `rank`."""

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        lora = part.load(tensors)
        A, B = lora.A, _times(lora.B, factor)
        if rank is not None and rank > lora.rank:
            pad = rank - lora.rank
            A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
        return ExpertLora(A, B, lora.scaling / factor if factor else lora.scaling)

    return replace(part, load=load)


def zeros_like(part: Part, role: str, in_features: int, out_features: int) -> Part:
    """A part that changes nothing, with the experts, rank, dtype and scaling of another one."""

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        lora = part.load(tensors)
        A = lora.A.new_zeros(lora.num_experts, lora.rank, in_features)
        return ExpertLora(A, lora.B.new_zeros(lora.num_experts, out_features, lora.rank), lora.scaling)

    return replace(part, name=role, role=role, load=load, steps=())
