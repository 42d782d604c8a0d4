"""Two adapters compared by what they do: the per-expert updates, in float64, whatever form each file has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..layout import ExpertLora, relative
from .base_model import BaseModel
from .decide import decide
from .files import finite_or_null
from .parts import Part, plain_part
from .refit import module_parts
from .shaping import part_gate_up
from .source import AdapterSource, open_adapter, uncollected
from .stated import Stated

__all__ = ["Comparison", "Verification", "verify_adapters"]

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # the first number of a path is that of a layer


_BLOCK = 2**24  # numbers of an update in memory at once
_MAX_NUMBERS = 2**32  # of one update; an lm_head of the largest models has 2**30


@dataclass(frozen=True)
class Comparison:
    """One projection of one experts module, or one other tensor.

    Attributes:
        name: Of the module or tensor, in the first file where it is there.
        projection: `"gate_up"`, `"gate"`, `"up"`, `"down"`, another parameter's name, `"linear"` for the LoRA of an
            ordinary linear, or empty for a tensor that is none.
        max_difference: Largest absolute difference of an entry of the update.
        relative_difference: Norm of the difference over norm of the first file's update; 0 where both are zero.
        note: What kept them from being compared, if anything did.
    """

    name: str
    projection: str
    max_difference: float
    relative_difference: float
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify_adapters` found: `same` where no comparison exceeds `tolerance`, relatively."""

    rows: tuple[Comparison, ...]
    tolerance: float

    @property
    def same(self) -> bool:
        return all(not row.note and row.relative_difference <= self.tolerance for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest relative difference; NaN where one is."""
        found = [row.relative_difference for row in self.rows]
        return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no number that is infinite or NaN: null for those."""
        found = {"schema_version": 1, "same": self.same, "worst": self.worst, "tolerance": self.tolerance}
        rows = [{key: finite_or_null(value) for key, value in asdict(row).items()} for row in self.rows]
        return {key: finite_or_null(value) for key, value in found.items()} | {"rows": rows}


@dataclass(frozen=True)
class _Side:
    """One of the two adapters, opened and decided: its LoRA by (place, role), its other tensors as `AdapterSource`."""

    source: AdapterSource
    parts: Mapping[tuple[str, str], Part]
    rest: Mapping[str, str]


def verify_adapters(
    adapter: str | Path,
    other: str | Path,
    *,
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    tolerance: float = 1e-6,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compares what two adapters do to every expert, and everything else in them.

    Args:
        adapter, other: Folders or Hub ids: an adapter, and what became of it.
        model: The base model's config, needed where one file has gate and up joined and the other has not.
        written_by, orientation, packing, nesting: Of the first adapter, as `convert_adapter` takes them.
        tolerance: Largest relative difference of an update that counts as the same.
        progress: Called with (comparisons done, comparisons in all).

    Raises:
        AdapterError: One of them cannot be read, see `convert_adapter`, or the model's config is needed.
        UnsupportedPeftError: `written_by` names no PEFT release with expert LoRA.
    """
    first = _side(adapter, Stated(model, written_by, orientation, packing, nesting))
    second = _side(other, Stated(model if model is not None else first.source.base))
    if any(role == "gate_up" for _, role in first.parts) != any(role == "gate_up" for _, role in second.parts):
        first, second = _parted(first), _parted(second)
    linears = _renamed(*([path for path, role in side.parts if role == "linear"] for side in (first, second)))
    second = replace(
        second,
        parts={(linears.get(path, path), role): part for (path, role), part in second.parts.items()},
        rest=_under_first_names(first.rest, second.rest),
    )
    keys = list(dict.fromkeys([*first.parts, *second.parts]))
    tensors = list(dict.fromkeys([*first.rest, *second.rest]))
    if not keys and not tensors:
        raise AdapterError(f"There is nothing to compare: neither {adapter} nor {other} holds a tensor.")
    rows = []
    for done, key in enumerate(keys):
        rows.append(_compare_parts(key, first, second))
        if progress is not None:
            progress(done + 1, len(keys))
    rows += [_compare_tensor(name, first, second) for name in tensors]
    return Verification(tuple(rows), tolerance)


def _side(adapter: str | Path, stated: Stated) -> _Side:
    """One of the two; errors say which."""
    try:
        return _read(adapter, stated)
    except AdapterError as error:
        if str(adapter) not in str(error):
            error.args = (f"{adapter}: {error}",)
        raise


@uncollected()
def _read(adapter: str | Path, stated: Stated) -> _Side:
    source = open_adapter(adapter, stated)
    decision = decide(source, stated)
    decision.require(str(source.folder))
    parts: dict[tuple[str, str], Part] = {}
    stems = _stems(module.path for module in source.modules)
    for part in module_parts(source, decision, fill_missing=True):
        key = _place(part.path, stems), part.role or part.name
        if (other := parts.setdefault(key, part)) is not part:  # of experts without a gate, whose up has two names
            raise AdapterError(f"{part.path!r} has two {key[1]} LoRA ({other.name}, {part.name}); one was expected.")
    base = source.base
    paths = [base.beside_experts(slot.path, "fused") if base else slot.path for slot in source.linears]
    linears = {(path, "linear"): plain_part(slot) for path, slot in zip(paths, source.linears, strict=True)}
    return _Side(source, parts | linears, source.rest)


def _renamed(first: Sequence[str], second: Sequence[str]) -> dict[str, str]:
    """What of the second is called otherwise in the first: the only one there alike from the layer on."""

    def by_tail(names: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in there and (layer := _LAYER.search(name)):
                found.setdefault(name[layer.start(1) :], []).append(name)
        return found

    there = {*first} & {*second}
    ours, theirs = by_tail(first), by_tail(second)
    alike = ((ours.get(tail, []), names) for tail, names in theirs.items())
    return {b: a for found, names in alike if len(found) == len(names) == 1 for a, b in zip(found, names, strict=True)}


def _under_first_names(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    renamed = _renamed([*first], [*second])
    return {renamed.get(name, name): there for name, there in second.items()}


def _stems(paths: Iterable[str]) -> dict[str, set[str]]:
    """Layer -> what its experts modules are called, but for how each of them ends."""
    found: dict[str, set[str]] = {}
    for path in paths:
        if layer := _LAYER.search(path):
            stem = re.sub(r"\.(experts|experts\.fc[12]|input_linear|output_linear)$", "", path)
            found.setdefault(layer[1], set()).add(stem)
    return found


def _place(path: str, stems: Mapping[str, set[str]]) -> str:
    """What the same module is called in every form: its layer, where no other experts module stands in that layer.

    granitemoe's and aria's two modules of one layer count as one: their parts differ in role.
    """
    layer = _LAYER.search(path)
    return f"layer {layer[1]}" if layer is not None and len(stems[layer[1]]) == 1 else path


def _parted(side: _Side) -> _Side:
    """With gate and up apart."""
    source, parts = side.source, dict[tuple[str, str], Part]()
    for (place, role), part in side.parts.items():
        if role != "gate_up":
            parts[place, role] = part
            continue
        if source.base is None:
            raise AdapterError(
                f"{source.folder} has gate and up joined and the other adapter has not; pass --model (model=...) to "
                "tell their rows apart."
            )
        for half in part_gate_up(part, source.base.interleaved, None, source.config.use_rslora):
            parts[place, half.name] = half
    return replace(side, parts=parts)


def _compare_parts(key: tuple[str, str], first: _Side, second: _Side) -> Comparison:
    named = (first.parts.get(key) or second.parts[key]).path, key[1]
    loras = [_load(side, key) for side in (first, second)]
    there = [lora for lora in loras if lora is not None]
    shape = (there[0].out_features, there[0].in_features)
    if any((lora.out_features, lora.in_features) != shape for lora in there):
        return Comparison(*named, math.inf, math.inf, "the two have different sizes")
    largest, squares, norm = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    if math.prod(shape) > _MAX_NUMBERS:
        raise AdapterError(f"{named[0]}: an update of {shape[0]} x {shape[1]} numbers is more than is compared.")
    # Several experts at once, or some rows of one.
    few = _blocks(max(lora.num_experts for lora in there), _BLOCK // max(1, math.prod(shape)))
    for experts, rows in product(few, _blocks(shape[0], _BLOCK // max(1, shape[1]))):
        deltas = [_delta(lora, experts, rows, shape[1]) for lora in loras]
        difference = deltas[0] - deltas[1]
        largest = torch.maximum(largest, difference.abs().max())  # keeps NaN
        squares += difference.square().sum().item()
        norm += deltas[0].square().sum().item()
    return Comparison(*named, largest.item(), relative(squares, norm) ** 0.5)


def _load(side: _Side, key: tuple[str, str]) -> ExpertLora | None:
    if key not in side.parts:
        return None
    part = side.parts[key]
    with side.source.tensors.reading(part.reads) as tensors:
        return part.load(tensors)


def _blocks(size: int, most: int) -> list[slice]:
    return [slice(begin, min(begin + max(1, most), size)) for begin in range(0, size, max(1, most))]


def _delta(lora: ExpertLora | None, experts: slice, rows: slice, in_features: int) -> Tensor:
    """Rows of these experts' updates, "E out in", in float64; zero where there is none."""
    delta = torch.zeros(experts.stop - experts.start, rows.stop - rows.start, in_features, dtype=torch.float64)
    if lora is not None:
        A, B = lora.A[experts].double(), lora.B[experts, rows].double()
        delta[: len(A)] = (B @ A) * lora.scaling
    return delta


def _compare_tensor(name: str, first: _Side, second: _Side) -> Comparison:
    """A tensor that is no LoRA of a linear: an embedding, a magnitude, a module saved whole."""
    values: list[Tensor] = []
    for side, other in ((first, "second"), (second, "first")):
        if name not in side.rest:
            return Comparison(name, "", math.inf, math.inf, f"only the {other} adapter has it")
        with side.source.tensors.reading([side.rest[name]]) as tensors:
            values += tensors.values()
    if values[0].shape != values[1].shape:
        return Comparison(name, "", math.inf, math.inf, "the two have different sizes")
    if values[0].dtype == values[1].dtype and bool((values[0] == values[1]).all()):
        return Comparison(name, "", 0.0, 0.0)
    if not all(value.is_floating_point() or value.is_complex() for value in values):
        return Comparison(name, "", math.inf, math.inf, "the two are whole numbers, and not the same")
    wide = [torch.view_as_real(value.to(torch.complex128)) for value in values]
    difference = wide[0] - wide[1]
    distance = relative(difference.norm().item(), wide[0].norm().item())
    return Comparison(name, "", difference.abs().max().item(), distance)
