"""Which axis lora_A of a fused file spans, and which wrapper belongs to which parameter, as shapes or the stamp say.

A *reading* is an orientation and, per kind of module, a nesting. Every module rules readings out by its shapes; what
is left after all have done so is settled by provenance, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import perm

from ..errors import AdapterError, AdapterFileError
from ..families import ROLE_ORDER
from ..layout import ORIENTATIONS
from .base_model import BaseModel, role_sizes
from .bounds import MAX_ORDERS
from .conclusions import Evidence
from .names import role_of
from .slots import ExpertsModule
from .source import AdapterSource

__all__ = ["Reading", "Readings", "parameter_order", "readings_by_shape", "readings_by_stamp", "slot_orientations"]


@dataclass(frozen=True)
class Reading:
    """One way to read a fused module: orientation, and the parameter of each slot, innermost first.

    Attributes:
        in_parameter_order: Whether the nesting is the one PEFT makes of an untouched module.
        counts: E of each slot. Modules that are read alike may differ in it.
    """

    orientation: str
    nesting: tuple[str, ...]
    in_parameter_order: bool
    counts: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Readings:
    """How the modules of a file can be read.

    Attributes:
        by_path: Path -> possible readings; those of modules with the same candidates are already intersected.
        evidence: What says so.
        likely: Whether a size from elsewhere in the file was needed, which is no proof.
    """

    by_path: Mapping[str, tuple[Reading, ...]]
    evidence: Evidence
    likely: bool = False

    @property
    def orientations(self) -> set[str]:
        """Those that every module allows."""
        sets = [{reading.orientation for reading in readings} for readings in self.by_path.values()]
        return set.intersection(*sets) if sets else set(ORIENTATIONS)

    @property
    def counts(self) -> dict[str, tuple[int, ...]]:
        """Path -> E of each slot, where every possible reading gives the same."""
        options = {path: {reading.counts for reading in readings} for path, readings in self.by_path.items()}
        return {path: counts.pop() for path, counts in options.items() if len(counts) == 1}


def parameter_order(path: str, names: Iterable[str]) -> tuple[str, ...]:
    """Parameters in the order PEFT nests them in an untouched module, innermost first."""
    return tuple(sorted(names, key=lambda name: ((*ROLE_ORDER, None).index(role_of(path, name)), name)))


def slot_orientations(orientation: str, counts: Sequence[int]) -> list[str]:
    """Of each slot, by its number of experts: a bias among stacks is a matrix, which no release turns but 0.19.0."""
    return ["linear" if count == 1 < max(counts) else orientation for count in counts]


def slot_counts(module: ExpertsModule, nesting: Sequence[str]) -> tuple[int, ...] | None:
    """E of every slot, None where a slot's rows are no multiple of its rank."""
    counts = tuple(slot.num_experts(name) or 0 for name, slot in zip(nesting, module.slots, strict=True))
    return counts if all(counts) else None


def readings_by_shape(source: AdapterSource, nesting: Sequence[str] | None) -> Readings:
    """What the shapes of all modules together allow. Modules with the same candidates share one nesting.

    Args:
        source: A fused file.
        nesting: Said by the caller.

    Raises:
        AdapterFileError: They allow nothing.
        AdapterError: `nesting` is no order of the parameters.
    """
    orders = sum(perm(len(module.slots[0].candidates), len(module.slots)) for module in source.modules)
    if orders > MAX_ORDERS:
        most = max(source.modules, key=lambda module: len(module.slots))
        raise AdapterFileError(
            f"{most.path!r} has LoRA at {len(most.slots)} nesting levels, and {len(most.slots[0].candidates)} "
            f"parameters are targeted: they can be nested in more orders ({orders} over all modules) than are tried "
            f"({MAX_ORDERS}). Is adapter_config.json that of another adapter?"
        )
    candidates = {module.path: _nestings(module, nesting) for module in source.modules}

    def possible(hidden_size: int | None) -> dict[str, tuple[Reading, ...]]:
        by_path = {
            module.path: _possible(module, candidates[module.path], source.base, hidden_size)
            for module in source.modules
        }
        shared: dict[tuple[tuple[str, ...], ...], set[Reading]] = {}
        for path, readings in by_path.items():
            kind = tuple(candidates[path])
            shared[kind] = shared.get(kind, set(readings)) & set(readings)
        return {p: tuple(r for r in by_path[p] if r in shared[tuple(candidates[p])]) for p in by_path}

    count = len(source.modules)
    shapes = Evidence("one_shape") if count == 1 else Evidence("shapes", {"count": count})
    found = Readings(possible(None), shapes)
    if not found.orientations:
        raise AdapterFileError(_no_reading(source, candidates))
    if source.base is None and len(found.orientations) > 1 and (hidden := _hidden_size(source)) is not None:
        evidence = Evidence("shapes_and_hidden", {"shapes": shapes, "hidden": hidden})
        narrowed = Readings(possible(hidden), evidence, likely=True)
        if narrowed.orientations:
            return narrowed
    return found


def _nestings(module: ExpertsModule, said: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Every assignment of the candidate parameters to the module's slots, PEFT's own order first."""
    ordered = parameter_order(module.path, module.slots[0].candidates)
    if len(ordered) < len(module.slots):
        raise AdapterFileError(
            f"{module.path!r} has LoRA at {len(module.slots)} nesting levels, but only {', '.join(ordered)} is "
            "targeted. Is adapter_config.json that of another adapter?"
        )
    found = list(permutations(ordered, len(module.slots)))
    if said is None or (len(module.slots) == 1 and tuple(said) not in found):  # or it is that of other modules
        return found
    if tuple(said) not in found:
        options = " or ".join([*(",".join(candidate) for candidate in found[:8]), *["..."] * (len(found) > 8)])
        raise AdapterError(f"nesting is {','.join(said)}; {options} was expected for {module.path!r}.")
    return [tuple(said)]


def _possible(
    module: ExpertsModule,
    candidates: Sequence[tuple[str, ...]],
    model: BaseModel | None,
    hidden_size: int | None = None,
) -> tuple[Reading, ...]:
    """The readings of a fused module, of those nestings, that its shapes and what is known of the model allow."""
    found = []
    for nesting in candidates:
        counts = slot_counts(module, nesting)
        if counts is None or (model is None and len(set(counts)) > 1):
            continue
        roles = [role_of(module.path, name) for name in nesting]
        if {"gate_up", "up"} <= set(roles):
            continue  # no model has both
        for orientation in ("linear",) if any(slot.unfolded for slot in module.slots) else ORIENTATIONS:
            each = slot_orientations(orientation, counts)
            sizes = [slot.features(one) for slot, one in zip(module.slots, each, strict=True)]
            stacks = zip(nesting, roles, counts, sizes, strict=True)
            fits = model is None or all(model.fits(module.path, *stack) for stack in stacks)
            if fits and _sizes_fit(roles, sizes, hidden_size):
                in_order = nesting == tuple(name for name in candidates[0] if name in nesting)
                found.append(Reading(orientation, nesting, in_order, counts))
    return tuple(found)


def _sizes_fit(roles: Sequence[str | None], sizes: Sequence[tuple[int, int]], hidden_size: int | None) -> bool:
    """Whether the slots agree on the hidden and the intermediate size that their roles imply."""
    shown = [role_sizes(role, features) for role, features in zip(roles, sizes, strict=True) if role is not None]
    hidden = {size for size, _ in shown} | (set() if hidden_size is None else {hidden_size})
    intermediate = {size for _, size in shown}
    return len(hidden) <= 1 and len(intermediate) <= 1 and 0 not in intermediate


def _no_reading(source: AdapterSource, candidates: Mapping[str, list[tuple[str, ...]]]) -> str:
    """The message for shapes that no reading explains."""
    alone = {module.path: _possible(module, candidates[module.path], source.base) for module in source.modules}
    stuck = next((module for module in source.modules if not alone[module.path]), None)
    if stuck is None:
        fits = {path: " or ".join(sorted({one.orientation for one in readings})) for path, readings in alone.items()}
        first, *others = alone
        apart = next((path for path in others if not set(alone[first]) & set(alone[path])), [*alone][-1])
        return (
            f"The layers of {source.folder} disagree: the shapes of {first!r} fit {fits[first]}, those of {apart!r} "
            f"{fits[apart]}. Was the file put together from two adapters?"
        )
    pairs = [(slot.lora_A.shape, slot.lora_B.shape) for slot in stuck.slots]
    sizes = ", ".join(f"lora_A {A[0]} x {A[1]} and lora_B {B[0]} x {B[1]}" for A, B in pairs)
    ranks = sorted({stuck.slots[0].candidates[name].rank for name in candidates[stuck.path][0]})
    expected = f"no stack of {source.base.described()}" if source.base else "no experts module"
    return (
        f"The LoRA of {stuck.path!r} ({sizes}, rank {', '.join(map(str, ranks))}) fits {expected} in any orientation "
        "or nesting. Was the adapter trained with another num_experts or rank, or for another model?"
    )


def _hidden_size(source: AdapterSource) -> int | None:
    """H as the LoRA on attention projections shows it; None where there is none, or several."""
    found = set()
    for slot in source.linears:
        if "vision" in slot.path or "visual" in slot.path:
            continue
        if slot.path.endswith((".q_proj", ".k_proj", ".v_proj")):
            found.add(slot.lora_A.shape[1])
        elif slot.path.endswith(".o_proj"):
            found.add(slot.lora_B.shape[0])
    return found.pop() if len(found) == 1 else None


def readings_by_stamp(source: AdapterSource, nesting: Sequence[str] | None) -> Readings | None:
    """What the stamp says of each module, once it is known to speak of this file, and the file of this model.

    Args:
        source: A fused file.
        nesting: Said by the caller.

    Returns:
        None where there is no stamp.

    Raises:
        AdapterFileError: It does not speak of this file, or the file not of this model.
        AdapterError: `nesting` has other parameters.
    """
    if source.stamp is None:
        return None
    readings = {}
    for module in source.modules:
        said = source.stamp.modules.get(module.path)
        sizes = () if said is None else tuple(slot.features(said.orientation) for slot in module.slots)
        if said is None or sizes != said.features:
            raise AdapterFileError(
                f"The stamp of peft_moe_compat in this file does not describe the LoRA of {module.path!r}: it says "
                f"{said.features if said else 'nothing'} (in, out), the tensors {sizes}. Was the file edited?"
            )
        counts = slot_counts(module, said.nesting)
        if counts is None or said.num_experts not in counts:
            raise AdapterFileError(
                f"The stamp of peft_moe_compat in this file says {said.num_experts} experts for {module.path!r}, and "
                f"with the ranks in adapter_config.json it has {counts or 'no whole number'}. Was one of them edited?"
            )
        for name, count, features in zip(said.nesting, counts, said.features, strict=True):
            if source.base is not None:
                source.base.require(module.path, name, role_of(module.path, name), count, features)
        if nesting is not None and len(said.nesting) > 1 and sorted(said.nesting) != sorted(nesting):
            there = ",".join(said.nesting)
            raise AdapterError(f"nesting is {','.join(nesting)}; the stamp has {there} at {module.path!r}.")
        in_order = said.nesting == parameter_order(module.path, said.nesting)
        readings[module.path] = (Reading(said.orientation, said.nesting, in_order, counts),)
    return Readings(readings, Evidence("stamp"))
