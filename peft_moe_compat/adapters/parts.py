"""The experts' LoRA of an opened adapter in canonical form, projection by projection, each read when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from ..layout import ExpertLora, from_flat
from .names import linear_role, role_of
from .shapes import Reading, slot_orientations
from .slots import ExpertSlot, ExpertsModule, FusedSlot, LinearSlot, StackSlot
from .steps import Step

__all__ = ["Load", "Part", "fused_parts", "per_expert_parts", "plain_part", "stacked_parts"]

Load = Callable[[Mapping[str, Tensor]], ExpertLora]


@dataclass(frozen=True)
class Part:
    """LoRA of one projection of one experts module, not read yet.

    Attributes:
        path: Of the module, as the file has it.
        name: Of the parameter or linear, as the file has it.
        role: `"gate_up"`, `"gate"`, `"up"`, `"down"`, or None for a parameter nobody gave one.
        alpha: LoRA alpha that belongs to the rank of the loaded factors.
        reads: Names of the tensors it needs.
        load: Those tensors, by name -> factors.
        steps: What bringing them into this form takes.
    """

    path: str
    name: str
    role: str | None
    alpha: float
    reads: tuple[str, ...]
    load: Load
    steps: tuple[Step, ...] = ()


def fused_parts(module: ExpertsModule, reading: Reading, packing_of: Callable[[str], str]) -> list[Part]:
    """A fused module, slot by slot, innermost first. `packing_of` says it for each parameter."""
    each = slot_orientations(reading.orientation, reading.counts)
    found = []
    for name, slot, count, orientation in zip(reading.nesting, module.slots, reading.counts, each, strict=True):
        numbers = slot.candidates[name]
        load = partial(
            _from_pair,
            slot,
            num_experts=count,
            orientation=orientation,
            packing=packing_of(name),
            scaling=numbers.scaling,
        )
        found.append(Part(module.path, name, role_of(module.path, name), numbers.alpha, slot.names, load))
    return found


def _from_pair(slot: FusedSlot, tensors: Mapping[str, Tensor], **how: Any) -> ExpertLora:
    # lora_B turned once, by torch's fast 2-D transpose, so that each expert's columns lie in rows from here on.
    A, B = (tensors[name] for name in slot.names)
    return from_flat(A, B.t().contiguous().t(), **how)


def stacked_parts(module: ExpertsModule, num_experts: int | None) -> list[Part]:
    """A module of stacks.

    Raises:
        AdapterError: All experts share a LoRA, and their number is not known.
    """
    found = []
    for slot in module.stacks:
        if slot.layout == "shared" and num_experts is None:
            raise AdapterError(
                f"All experts of {module.path!r} share one LoRA on {slot.parameter}. Pass --model (model=...) to tell "
                "how many experts there are."
            )
        role = role_of(module.path, slot.parameter) or linear_role(slot.parameter)
        load = partial(_from_stacks, slot, num_experts or 0)
        found.append(Part(module.path, slot.parameter, role, slot.numbers.alpha, slot.names, load))
    return found


def _from_stacks(slot: StackSlot, num_experts: int, tensors: Mapping[str, Tensor]) -> ExpertLora:
    A, B = (tensors[name] for name in slot.names)
    if slot.layout == "shared":
        A, B = A.expand(num_experts, -1, -1), B.expand(num_experts, -1, -1)
    elif slot.layout == "transposed":
        A, B = A.transpose(1, 2), B.transpose(1, 2)
    return ExpertLora(A, B, slot.numbers.scaling)


def plain_part(slot: LinearSlot) -> Part:
    """The LoRA of an ordinary linear, as that of a single expert."""

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        A, B = (tensors[name][None] for name in slot.names)
        return ExpertLora(A, B, slot.numbers.scaling)

    return Part(slot.path, slot.path.rpartition(".")[2], None, slot.numbers.alpha, slot.names, load)


def per_expert_parts(module: ExpertsModule, *, num_experts: int | None, fill_missing: bool) -> list[Part]:
    """A per-expert module, its experts stacked per projection.

    Ranks that differ between experts are padded with zeros, scalings that differ are folded into B.

    Args:
        module: A per-expert module.
        num_experts: E, where it is known.
        fill_missing: Whether experts without LoRA get one of zeros.

    Raises:
        AdapterFileError: The factors do not fit together.
        AdapterError: Experts are missing and `fill_missing` is false.
    """
    by_linear: dict[str, dict[int, ExpertSlot]] = {}
    for slot in module.experts:
        by_linear.setdefault(slot.linear, {})[slot.expert] = slot
    total = num_experts or 1 + max(slot.expert for slot in module.experts)
    return [
        _stacked_experts(module.path, linear, experts, total, fill_missing) for linear, experts in by_linear.items()
    ]


def _stacked_experts(path: str, linear: str, experts: Mapping[int, ExpertSlot], total: int, fill: bool) -> Part:
    what = f"{path!r}, {linear}"
    if max(experts) >= total:
        raise AdapterError(f"{what} has LoRA for expert {max(experts)}, but the model has {total} experts.")
    missing = [expert for expert in range(total) if expert not in experts]
    if missing and not fill:
        raise AdapterError(
            f"{what} has LoRA for {len(experts)} of {total} experts (expert {missing[0]} has none). Pass "
            "--fill-missing (fill_missing=True) to give the others a LoRA of zeros, which changes nothing."
        )
    if len(sizes := {(slot.lora_A.shape[1], slot.lora_B.shape[0]) for slot in experts.values()}) > 1:
        raise AdapterFileError(f"{what} differs in size between experts: (in, out) are {sorted(sizes)}.")
    ranks = {expert: slot.numbers.rank for expert, slot in experts.items()}
    scalings = {expert: slot.numbers.scaling for expert, slot in experts.items()}
    rank = max(ranks.values())
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    nonzero = [value for value in scalings.values() if value] or [0.0]
    scaling = Counter(nonzero).most_common(1)[0][0]
    folds = {e: s / scaling for e, s in scalings.items() if s != scaling}
    steps = []
    if min(ranks.values()) < rank:
        steps.append(Step("experts_padded", (min(ranks.values()), rank, linear)))
    if folds:
        steps.append(Step("experts_folded", (linear,)))
    if missing:
        steps.append(Step("experts_filled", (linear,)))
    numbers = [slot.numbers for slot in experts.values()]
    kept = [one.alpha for one in numbers if (one.rank, one.scaling) == (rank, scaling)]
    alpha = kept[0] if kept else scaling * (rank**0.5 if numbers[0].rslora else rank)
    reads = tuple(name for slot in experts.values() for name in slot.names)
    load = partial(_stack, experts, total, rank, scaling, folds)
    return Part(path, linear, linear_role(linear), alpha, reads, load, tuple(steps))


def _stack(
    experts: Mapping[int, ExpertSlot],
    total: int,
    rank: int,
    scaling: float,
    folds: Mapping[int, float],
    tensors: Mapping[str, Tensor],
) -> ExpertLora:
    pairs = {e: (tensors[slot.lora_A.name], tensors[slot.lora_B.name]) for e, slot in experts.items()}
    first_A, first_B = next(iter(pairs.values()))
    dtypes_A = {A.dtype for A, _ in pairs.values()}
    dtypes_B = {B.dtype for _, B in pairs.values()} | ({torch.float32} if folds else set())
    A = first_A.new_zeros(total, rank, first_A.shape[1], dtype=_widest(dtypes_A))
    B = first_B.new_zeros(total, first_B.shape[0], rank, dtype=_widest(dtypes_B))
    for expert, (a, b) in pairs.items():
        A[expert, : a.shape[0]] = a
        B[expert, :, : b.shape[1]] = b.to(B.dtype) * folds[expert] if expert in folds else b
    return ExpertLora(A, B, scaling)


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first
