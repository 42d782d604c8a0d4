"""The experts' LoRA of an opened adapter in canonical form, projection by projection, each read when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from ..layout import ExpertLora, common_dtype, from_flat
from .bounds import MAX_EXPERTS, require_room
from .decide import Decision
from .names import linear_role, role_of
from .safetensors_io import without_data
from .shapes import slot_orientations
from .slots import ExpertSlot, ExpertsModule, FusedSlot, LinearSlot, Slot, StackSlot
from .steps import Step

__all__ = ["Part", "expert_parts", "open_part", "plain_part", "times"]

_MAX_FOLD = 1e12  # float32 holds 1e-38 to 1e38, and the factors of LoRA lie around 1e-3


@dataclass(frozen=True)
class Part:
    """LoRA of one projection of one experts module, not read yet.

    Attributes:
        path: Of the module, as the file has it.
        name: Of the parameter or linear, as the file has it.
        role: `"gate_up"`, `"gate"`, `"up"`, `"down"`, or None for a parameter nobody gave one.
        alpha: LoRA alpha that belongs to the rank of the loaded factors.
        slots: It is made of their tensors.
        load: Those tensors, by name -> factors.
        steps: What bringing them into this form takes.
        joined: The ranks of gate and up, where they were joined block-diagonally.
    """

    path: str
    name: str
    role: str | None
    alpha: float
    slots: tuple[Slot, ...]
    load: Callable[[Mapping[str, Tensor]], ExpertLora]
    steps: tuple[Step, ...] = ()
    joined: tuple[int, int] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors it needs."""
        return tuple(dict.fromkeys(name for slot in self.slots for name in slot.names))

    @cached_property
    def meta(self) -> ExpertLora:
        """The factors without their data, to find out what a conversion will write before it reads anything."""
        return self.load(without_data(factor for slot in self.slots for factor in (slot.lora_A, slot.lora_B)))


def expert_parts(
    module: ExpertsModule, decision: Decision | None, counts: Collection[int] = (), fill_missing: bool = True
) -> list[Part]:
    """The LoRA of an experts module; fused ones innermost wrapper first.

    Args:
        module: Of any form.
        decision: What a file with fused modules holds.
        counts: Of experts that the model may have, where that is known. A linear has the fewest that it has LoRA for.
        fill_missing: Whether experts of a per-expert module without LoRA get one of zeros.

    Raises:
        AdapterFileError: The factors do not fit together.
        AdapterError: Experts are missing and `fill_missing` is false, or they share a LoRA and E is not known.
    """
    if module.form == "stacked":
        return [_stack_part(module.path, slot, counts) for slot in module.stacks]
    if decision is not None and module.form == "fused":
        return _fused_parts(module, decision)
    by_linear: dict[str, dict[int, ExpertSlot]] = {}
    for slot in module.experts:
        by_linear.setdefault(slot.linear, {})[slot.expert] = slot
    needed = {linear: 1 + max(slots) for linear, slots in by_linear.items()}
    most = max(needed.values())
    if most > MAX_EXPERTS:
        raise AdapterFileError(
            f"{module.path!r} has LoRA for expert {most - 1}; fewer than {MAX_EXPERTS} were expected. Is the file "
            "damaged?"
        )
    found = []
    for linear, slots in by_linear.items():
        total = min((c for c in counts if c >= needed[linear]), default=max(counts)) if counts else most
        found.append(_linear_part(module.path, linear, slots, total, fill_missing))
    return found


def _fused_parts(module: ExpertsModule, decision: Decision) -> list[Part]:
    reading = decision.readings[module.path]
    each = slot_orientations(reading.orientation, reading.counts)
    found = []
    for name, slot, count, orientation in zip(reading.nesting, module.slots, reading.counts, each, strict=True):
        numbers = slot.candidates[name]
        if slot.unfolded:
            load = partial(_from_stacks, slot, numbers.scaling)
        else:
            how = (count, orientation, decision.packing_of(name), numbers.scaling)
            load = partial(_from_pair, slot.names, how)
        found.append(Part(module.path, name, role_of(module.path, name), numbers.alpha, (slot,), load))
    return found


def _from_pair(names: tuple[str, str], how: tuple[int, str, str, float], tensors: Mapping[str, Tensor]) -> ExpertLora:
    num_experts, orientation, packing, scaling = how
    A, B = (tensors[name] for name in names)
    # lora_B turned once, by torch's fast 2-D transpose, so that each expert's columns lie in rows from here on.
    B = B.t().contiguous().t()
    return from_flat(A, B, num_experts, orientation=orientation, packing=packing, scaling=scaling)


def _from_stacks(slot: FusedSlot, scaling: float, tensors: Mapping[str, Tensor]) -> ExpertLora:
    A, B = (tensors[name] for name in slot.names)
    return ExpertLora(A, B if slot.expert_slowest else B.permute(2, 0, 1), scaling)


def _stack_part(path: str, slot: StackSlot, counts: Collection[int]) -> Part:
    total = slot.num_experts if slot.num_experts > 1 else max(counts, default=0)
    if slot.num_experts == 1 and len(counts) != 1:
        raise AdapterError(
            f"All experts of {path!r} share one LoRA on {slot.parameter}. Pass --model (model=...) to tell how many "
            "experts there are."
        )

    (*_, a, b), (*_, c, d) = slot.lora_A.shape, slot.lora_B.shape
    _require_room(f"{path!r}, {slot.parameter}", (slot,), total * (a * b + c * d))

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        A, B = (stack if stack.ndim == 3 else stack[None] for stack in (tensors[name] for name in slot.names))
        if slot.layout == "transposed":
            A, B = A.transpose(1, 2), B.transpose(1, 2)
        return ExpertLora(A.expand(total, -1, -1), B.expand(total, -1, -1), slot.numbers.scaling)

    role = role_of(path, slot.parameter) or linear_role(slot.parameter)
    return Part(path, slot.parameter, role, slot.numbers.alpha, (slot,), load)


def _require_room(what: str, slots: tuple[Slot, ...], numel: int) -> None:
    """Before that many numbers are made of the tensors of these slots."""
    factors = [factor for slot in slots for factor in (slot.lora_A, slot.lora_B)]
    require_room(
        what, numel * max(factor.dtype.itemsize for factor in factors), sum(factor.nbytes for factor in factors)
    )


def plain_part(slot: LinearSlot) -> Part:
    """The LoRA of an ordinary linear, as that of a single expert."""

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        A, B = (factor if factor.ndim == 3 else factor[None] for factor in (tensors[name] for name in slot.names))
        return ExpertLora(A, B, slot.numbers.scaling)

    return Part(slot.path, slot.path.rpartition(".")[2], None, slot.numbers.alpha, (slot,), load)


def open_part(path: str, slot: FusedSlot) -> Part:
    """The LoRA of a fused slot whose reading is open: stacks as they are, a flat pair as that of a single expert."""
    numbers = next(iter(slot.candidates.values()))
    part = plain_part(LinearSlot(slot.lora_A, slot.lora_B, path, numbers))
    return replace(part, load=partial(_from_stacks, slot, numbers.scaling)) if slot.unfolded else part


def _of_expert(factor: Tensor, expert: int) -> Tensor:
    """An expert's matrix of a factor: its own, or that of a stack, which may be of one for all."""
    return factor if factor.ndim == 2 else factor[expert if factor.shape[0] > 1 else 0]


def times(B: Tensor, factor: float) -> Tensor:
    """B times what two scalings differ by; in float32 at least, unless the factor is 1.

    Raises:
        AdapterError: They differ by more than float32 has room for beside the numbers themselves, or than these have.
    """
    if factor == 1:
        return B
    if factor and not 1 / _MAX_FOLD <= abs(factor) <= _MAX_FOLD:
        raise AdapterError(
            f"Two scalings of this adapter (lora_alpha, alpha_pattern) differ by a factor of {factor:g}; at most "
            f"{_MAX_FOLD:g} can be folded into lora_B. Is adapter_config.json the one of this file?"
        )
    wide = B.to(common_dtype({B.dtype, torch.float32}))
    product = wide * factor
    if abs(factor) > 1 and not product.is_meta and bool(product.isinf().any()) and bool(wide.isfinite().all()):
        raise AdapterError(
            f"lora_B holds numbers up to {wide.abs().max().item():g}; times {factor:g}, by which two scalings of this "
            f"adapter differ, they are beyond {wide.dtype}. Did the training diverge?"
        )
    return product


def _linear_part(path: str, linear: str, experts: Mapping[int, ExpertSlot], total: int, fill: bool) -> Part:
    """One linear of all experts. Ranks that differ are padded with zeros, scalings that differ are folded into B."""
    what = f"{path!r}, {linear}"
    if max(experts) >= total:
        raise AdapterError(f"{what} has LoRA for expert {max(experts)}, but the model has {total} experts.")
    missing = len(experts) < total
    if missing and not fill:
        first = next(expert for expert in range(total) if expert not in experts)
        raise AdapterError(
            f"{what} has LoRA for {len(experts)} of {total} experts (expert {first} has none). Pass "
            "--fill-missing (fill_missing=True) to give the others a LoRA of zeros, which changes nothing."
        )
    if len(sizes := {(slot.lora_A.shape[-1], slot.lora_B.shape[-2]) for slot in experts.values()}) > 1:
        raise AdapterFileError(f"{what} differs in size between experts: (in, out) are {sorted(sizes)}.")
    ((fan_in, fan_out),) = sizes
    numbers = {expert: slot.numbers for expert, slot in experts.items()}
    ranks = {n.rank for n in numbers.values()}
    rank = max(ranks)
    _require_room(what, tuple(experts.values()), total * rank * (fan_in + fan_out))
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    nonzero = [n.scaling for n in numbers.values() if n.scaling] or [0.0]
    scaling = Counter(nonzero).most_common(1)[0][0]
    folds = {e: n.scaling / scaling for e, n in numbers.items() if n.scaling != scaling}
    steps = []
    if min(ranks) < rank:
        steps.append(Step("experts_padded", (min(ranks), rank, linear)))
    if folds:
        steps.append(Step("experts_folded", (linear,)))
    if missing:
        steps.append(Step("experts_filled", (linear,)))
    kept = [n.alpha for n in numbers.values() if (n.rank, n.scaling) == (rank, scaling)]
    rslora = next(iter(numbers.values())).rslora
    alpha = kept[0] if kept else scaling * (rank**0.5 if rslora else rank)

    dtypes_A = {slot.lora_A.dtype for slot in experts.values()}
    dtypes_B = {slot.lora_B.dtype for slot in experts.values()}
    dtype_A, dtype_B = common_dtype(dtypes_A), common_dtype(dtypes_B | ({torch.float32} if folds else set()))
    alike = not missing and len(ranks) == len(dtypes_A) == len(dtypes_B) == 1 and not folds

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        like, first = (tensors[name] for name in next(iter(experts.values())).names)
        if like.is_meta:
            for fold in set(folds.values()):
                times(first, fold)
            A = like.new_empty(total, rank, fan_in, dtype=dtype_A)
            return ExpertLora(A, like.new_empty(total, fan_out, rank, dtype=dtype_B), scaling)
        pairs = {e: [_of_expert(tensors[name], e) for name in slot.names] for e, slot in experts.items()}
        if alike:
            A, B = (torch.stack([pairs[e][side] for e in range(total)]) for side in (0, 1))
            return ExpertLora(A, B, scaling)
        A, B = like.new_zeros(total, rank, fan_in, dtype=dtype_A), like.new_zeros(total, fan_out, rank, dtype=dtype_B)
        for expert, (a, b) in pairs.items():
            A[expert, : a.shape[0]] = a
            B[expert, :, : b.shape[1]] = times(b, folds.get(expert, 1.0))
        return ExpertLora(A, B, scaling)

    slots = tuple(experts.values())
    return Part(path, linear, linear_role(linear), alpha, slots, load, tuple(steps))
