"""Which axis lora_A of a fused file spans, and which wrapper belongs to which parameter, from shapes and provenance.

A *reading* is an orientation and, per kind of module, a nesting. Every module rules readings out by its shapes; what
is left after all have voted is settled by provenance, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from ..errors import AdapterFileError
from ..families import ROLE_ORDER
from ..layout import ORIENTATIONS
from .base_model import BaseModel
from .names import ExpertsKeys, HasShape, role_of, targeted_parameters
from .ranks import lora_rank

__all__ = [
    "Reading",
    "SlotShape",
    "nestings",
    "parameter_order",
    "possible_readings",
    "slot_counts",
    "slot_orientations",
    "slot_shapes",
]


@dataclass(frozen=True)
class Reading:
    """One way to read a fused module: orientation, and the parameter of each slot, innermost first.

    Attributes:
        in_parameter_order: Whether the nesting is the one PEFT makes of an untouched module.
    """

    orientation: str
    nesting: tuple[str, ...]
    in_parameter_order: bool


@dataclass(frozen=True)
class SlotShape:
    """lora_A "(E r) p" and lora_B "q (E r)" of one slot: its rows E * r, p and q."""

    rows: int
    p: int
    q: int

    def features(self, orientation: str) -> tuple[int, int]:
        """(in, out) under that orientation."""
        return (self.p, self.q) if orientation == "linear" else (self.q, self.p)


def slot_orientations(orientation: str, counts: Sequence[int]) -> list[str]:
    """Of each slot, by its number of experts: a bias among stacks is a matrix, which no release turns but 0.19.0."""
    return ["linear" if count == 1 < max(counts) else orientation for count in counts]


def slot_shapes(module: ExpertsKeys, tensors: Mapping[str, HasShape]) -> tuple[SlotShape, ...]:
    """Sizes of a fused module's slots.

    Raises:
        AdapterFileError: lora_A and lora_B of a slot do not share their rank axis.
    """
    found = []
    for pair in module.slots:
        (rows, p), (q, columns) = tensors[pair.lora_A].shape, tensors[pair.lora_B].shape
        if rows != columns or 0 in (rows, p, q):
            raise AdapterFileError(
                f"{pair.lora_A!r} is {rows} x {p} and {pair.lora_B!r} {q} x {columns}; '(E r) p' and 'q (r E)' with "
                "the same E * r were expected. Do the two belong to the same adapter?"
            )
        found.append(SlotShape(rows, p, q))
    return tuple(found)


def parameter_order(path: str, names: Iterable[str]) -> tuple[str, ...]:
    """Parameters in the order PEFT nests them in an untouched module, innermost first."""
    return tuple(sorted(names, key=lambda name: ((*ROLE_ORDER, None).index(role_of(path, name)), name)))


def nestings(module: ExpertsKeys, config: Mapping[str, Any], known: Sequence[str]) -> list[tuple[str, ...]]:
    """Every assignment of parameters to the module's slots, PEFT's own order first.

    The candidates are the parameters the config targets, else those the model has (`known`), else those every gated
    family of transformers has.
    """
    names = targeted_parameters(config, module.path) or tuple(known) or ("gate_up_proj", "down_proj")
    ordered = parameter_order(module.path, names)
    if len(ordered) < len(module.slots):
        raise AdapterFileError(
            f"{module.path!r} has LoRA at {len(module.slots)} nesting levels, but only {', '.join(ordered)} is "
            "targeted. Is adapter_config.json that of another adapter?"
        )
    return list(permutations(ordered, len(module.slots)))


def possible_readings(
    module: ExpertsKeys,
    shapes: Sequence[SlotShape],
    config: Mapping[str, Any],
    candidates: Sequence[tuple[str, ...]],
    *,
    model: BaseModel | None = None,
    hidden_size: int | None = None,
) -> tuple[Reading, ...]:
    """The readings of one fused module that its shapes allow.

    Args:
        module: A fused module.
        shapes: Of its slots.
        config: `adapter_config.json`, for ranks.
        candidates: Nestings to try, as `nestings` gives them.
        model: The base model, if known.
        hidden_size: Of the base model, if known from elsewhere in the file.
    """
    found = []
    for nesting in candidates:
        counts = slot_counts(module.path, nesting, shapes, config)
        if counts is None or (model is None and len(set(counts)) > 1):
            continue
        roles = [role_of(module.path, name) for name in nesting]
        for orientation in ORIENTATIONS:
            each = slot_orientations(orientation, counts)
            sizes = [shape.features(one) for shape, one in zip(shapes, each, strict=True)]
            if model is not None:
                stacks = zip(nesting, roles, counts, sizes, strict=True)
                fits = all(model.fits(module.path, *stack) for stack in stacks)
            else:
                fits = True
            if fits and _sizes_fit(roles, sizes, hidden_size):
                found.append(Reading(orientation, nesting, nesting == tuple(n for n in candidates[0] if n in nesting)))
    return tuple(found)


def slot_counts(
    path: str, nesting: Sequence[str], shapes: Sequence[SlotShape], config: Mapping[str, Any]
) -> list[int] | None:
    """E of every slot, None where a slot's rows are no multiple of its rank."""
    counts = []
    for name, shape in zip(nesting, shapes, strict=True):
        count, rest = divmod(shape.rows, lora_rank(config, f"{path}.{name}"))
        if rest or not count:
            return None
        counts.append(count)
    return counts


def _sizes_fit(roles: Sequence[str | None], sizes: Sequence[tuple[int, int]], hidden_size: int | None) -> bool:
    """Whether the slots agree on the hidden and the intermediate size that their roles imply."""
    hidden = set() if hidden_size is None else {hidden_size}
    intermediate = set()
    for role, (fan_in, fan_out) in zip(roles, sizes, strict=True):
        if role == "down":
            hidden.add(fan_out)
            intermediate.add(fan_in)
        elif role is not None:
            hidden.add(fan_in)
            if role == "gate_up" and fan_out % 2:
                return False
            intermediate.add(fan_out // 2 if role == "gate_up" else fan_out)
    return len(hidden) <= 1 and len(intermediate) <= 1
