"""The numbers of a whole adapter, looked at part by part: every tensor is read once, and few are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from .base_model import BaseModel
from .conclusions import Finding
from .decide import Decision
from .health import Numbers, examine, far, findings, gaps, not_finite
from .outputs import LAYER
from .parts import Part, expert_parts, open_part, plain_part
from .shapes import slot_orientations
from .slots import ExpertsModule
from .source import AdapterSource
from .tensors import AdapterTensors

__all__ = ["contents"]

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)
_OF_ONE_MATRIX = {"not_finite", "not_trained", "zero_rows", "zero_columns", "huge"}  # that need no experts told apart
_LOT = 2**24  # bytes


@dataclass(frozen=True)
class _Look:
    """A part to look at.

    Attributes:
        is_reversed: Whether its lora_A is the canonical B.
        settled: Whether its experts, ranks and rows are known to be what they are.
    """

    part: Part
    is_reversed: bool = False
    settled: bool = True


def contents(source: AdapterSource, decision: Decision, progress: Progress | None = None) -> tuple[Finding, ...]:
    """What the numbers of an adapter show that training does not explain.

    Args:
        source, decision: The adapter, and what it was found to hold; fused modules whose reading is open are looked at
            as plain matrices.
        progress: Called with (bytes done, bytes in all).

    Raises:
        AdapterFileError: The file changed, or the factors do not fit together.
    """
    looks = [look for module in source.modules for look in _looks(module, source, decision)]
    looks += [_Look(plain_part(slot)) for slot in source.linears]
    reads = [look.part.reads for look in looks] + _together(source)
    found: list[Finding] = []
    norms: dict[tuple[str, str], dict[int, float]] = {}
    for index, tensors in enumerate(_read(source.tensors, reads, progress)):
        if index < len(looks):
            look = looks[index]
            numbers = examine(look.part.load(tensors), look.is_reversed)
            found += _of_part(look, numbers, source.base)
            if look.settled and (layer := LAYER.search(look.part.path)) is not None:
                kind = f"{look.part.path[: layer.start(1)]}*{look.part.path[layer.end(1) :]}", look.part.name
                norms.setdefault(kind, {})[int(layer[1])] = _typical(numbers)
        else:
            for name, tensor in tensors.items():
                nan, infinite = not_finite(tensor)
                found += (
                    [Finding("not_finite", name, None, {"nan": nan, "infinite": infinite})] if nan + infinite else []
                )
    found += [Finding("not_settled", path, None) for path in {look.part.path: 0 for look in looks if not look.settled}]
    chosen = source.config.raw.get("layers_to_transform") is not None
    return (*found, *_across_layers(norms, chosen))


def _read(
    tensors: AdapterTensors, reads: Sequence[tuple[str, ...]], progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    sizes = [sum(tensors.infos[name].nbytes for name in names) for names in reads]
    done, total = 0, sum(sizes)
    for names, size in zip(reads, sizes, strict=True):
        with tensors.reading(names) as found:
            yield found
        done += size
        if progress is not None:
            progress(done, total)


def _together(source: AdapterSource) -> list[tuple[str, ...]]:
    """The names of all that is no LoRA of experts or linears, in lots of few bytes: each opens the file once."""
    infos, lots = source.tensors.infos, dict[int, list[str]]()
    rest = [name for name in source.rest.values() if infos[name].nbytes]
    for name, end in zip(rest, accumulate(infos[name].nbytes for name in rest), strict=True):
        lots.setdefault(end // _LOT, []).append(name)
    return list(map(tuple, lots.values()))


def _of_part(look: _Look, numbers: Numbers, base: BaseModel | None) -> Iterator[Finding]:
    part = look.part
    halves: tuple[bool, ...] = ()
    if part.role == "gate_up":
        halves = (False, True) if base is None else (base.interleaved,)
    if look.settled and part.alpha == 0:
        yield Finding("no_scaling", part.path, part.name, {})
    for code, detail in findings(numbers, halves):
        if code == "unused_ranks" and part.role in ("gate", "up"):
            continue  # of the two that were joined, each has the other's ranks
        if look.settled or code in _OF_ONE_MATRIX:
            yield Finding(code, part.path, part.name if look.settled else None, detail)


def _typical(numbers: Numbers) -> float:
    """Median of the norms of the experts that have an update; 0 where there is none, or it was not worked out."""
    norms = numbers.norms[numbers.norms > 0]
    return float(norms.quantile(0.5)) if len(norms) else 0.0


def _across_layers(norms: Mapping[tuple[str, str], Mapping[int, float]], chosen: bool) -> Iterator[Finding]:
    """What shows only where the layers are side by side; `chosen` where the config names the layers that have LoRA."""
    every: dict[str, set[int]] = {}
    for (path, _), by_layer in norms.items():
        every.setdefault(path, set()).update(by_layer)
    for (path, name), by_layer in norms.items():
        missing = every[path] - by_layer.keys() | set(() if chosen else gaps(sorted(by_layer)))
        if missing:
            yield Finding("missing_layers", path, name, {"layers": sorted(missing)})
        layers = sorted(by_layer)
        if outside := far([by_layer[layer] for layer in layers]):
            yield Finding("far_layers", path, name, {"layers": [layers[index] for index in outside]})


def _looks(module: ExpertsModule, source: AdapterSource, decision: Decision) -> Iterator[_Look]:
    base = source.base
    if module.form == "fused" and not (module.path in decision.readings and decision.packing.decided):
        for slot in module.slots:
            yield _Look(open_part(module.path, slot), settled=False)
        return
    parts = expert_parts(module, decision, base.expert_counts if base else ())
    reading = decision.readings.get(module.path)
    each = slot_orientations(reading.orientation, reading.counts) if reading else ["linear"] * len(parts)
    for part, orientation in zip(parts, each, strict=True):
        yield _Look(part, orientation == "reversed")
