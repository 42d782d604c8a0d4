"""What an adapter file holds, concluded from all of its evidence: writer, orientation, packing, nesting.

Nothing is guessed. A conclusion without enough evidence has no value, and names the flag that would settle it.

    stamp              of this library, in the file's metadata           certain
    shapes             of all layers, against the model if it is known   certain
    written_by         what the caller says                              stated
    writer's own mark  peft_version, Unsloth's and Automodel's markers   stated
    data               column norms of lora_B, for the packing alone     likely
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..errors import AdapterError, AmbiguousAdapterError
from ..layout import PACKINGS
from ..releases import release_for
from .base_model import BaseModel
from .conclusions import Conclusion, Evidence, Settle
from .orientations import orientations
from .packing import packing_evidence
from .shapes import Reading, Readings, readings_by_shape, readings_by_stamp
from .source import AdapterSource
from .stated import Stated
from .writer import Writer, find_writer

__all__ = ["Decision", "decide"]

_NOT_FUSED = Conclusion("not applicable", "certain", (Evidence("not_fused"),))
_SAID = Evidence("said")
_SAMPLED_MATRICES = 8  # of lora_B, read for the test of the packing


@dataclass(frozen=True)
class Decision:
    """What a file holds.

    Attributes:
        writer, orientation, packing, nesting: Conclusions, see `Inspection`.
        readings: Path of a fused module -> how it is read; empty unless orientation and nesting are decided.
        expert_counts: Path of a fused module -> E of each of its slots, innermost first, where it is known.
        packings: Parameter -> packing of lora_B where Unsloth packed them differently; see `packing_of`.
        peft, transformers: The PEFT release whose layout rule the file follows, if known, and what was beside it.
    """

    writer: Conclusion
    orientation: Conclusion
    packing: Conclusion
    nesting: Conclusion
    readings: Mapping[str, Reading] = field(default_factory=dict)
    expert_counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    packings: Mapping[str | None, str] = field(default_factory=dict)
    peft: str | None = None
    transformers: str | None = None

    def packing_of(self, parameter: str) -> str:
        """`"rank_major"` or `"grouped"`, once the packing is decided."""
        if self.packing.value in PACKINGS:
            return str(self.packing.value)
        return self.packings.get(parameter) or self.packings.get(None, "rank_major")

    def require(self, what: str) -> None:
        """Raises `AmbiguousAdapterError` unless orientation, packing and nesting are decided. `what` names the file."""
        open_questions = [
            (name, conclusion)
            for name in ("orientation", "packing", "nesting")
            if not (conclusion := getattr(self, name)).decided
        ]
        if open_questions:
            lines = [
                f"its {name} is not settled: {conclusion.why}. Settle it with {conclusion.remedy}."
                for name, conclusion in open_questions
            ]
            raise AmbiguousAdapterError(f"{what} cannot be read without a guess: {' And '.join(lines)}")


def decide(source: AdapterSource, stated: Stated) -> Decision:
    """Concludes what an adapter holds.

    Args:
        source: The adapter. Its base model, if known, tells square cases of different projections, and transposed
            families, apart.
        stated: What the caller says of it.

    Raises:
        AdapterFileError: The file contradicts itself or the model.
        AdapterError: What the caller says of orientation or nesting is no possible answer.
    """
    writer = find_writer(source, stated)
    if source.form != "fused":
        return Decision(writer.conclusion, _NOT_FUSED, _NOT_FUSED, _NOT_FUSED, peft=writer.peft)
    possible = readings_by_stamp(source, stated.nesting) or readings_by_shape(source, stated.nesting)
    oriented = _orientation(source, possible, writer, stated)
    nested, readings = _nesting(source, possible, oriented, stated)
    packed = _packing(source, possible.counts, writer, stated)
    named = writer.conclusion
    if writer.peft and oriented.decided and oriented.value not in _orientations_of(writer, source.base, patched=False):
        remark = Evidence("not_its_own", {"orientation": oriented.value, "name": named.value})
        named = replace(named, evidence=(*named.evidence, remark))
    known = possible.counts, writer.packings, writer.peft, writer.transformers
    return Decision(named, oriented, packed, nested, readings, *known)


def _orientation(source: AdapterSource, readings: Readings, writer: Writer, stated: Stated) -> Conclusion:
    model, possible, said = source.base, readings.orientations, stated.orientation
    if said is not None:
        if said not in possible:
            raise AdapterError(
                f"orientation is {said!r}, but {readings.evidence} fit {' or '.join(sorted(possible))} alone."
            )
        return Conclusion(said, "stated", (_SAID,))
    if len(possible) == 1:
        (value,) = possible
        alone = Evidence("fit_alone", {"what": readings.evidence, "orientation": value})
        reason = alone if source.stamp is None else readings.evidence
        return Conclusion(value, "likely" if readings.likely else "certain", (reason,))
    both = Evidence("fit_both", {"what": readings.evidence})
    if writer.orientation is not None:
        return Conclusion(writer.orientation, "likely", (both, *writer.conclusion.evidence))
    if writer.peft is None:
        release = Settle("written_by", "peft==VERSION", "" if model else "both")
        settle = (release,) if model else (Settle("model", "BASE"), release)
        return Conclusion(None, "none", (both, Evidence("no_writer")), settle)
    # A caller who names the release means what it writes on its own.
    writes = _orientations_of(writer, model, patched=not writer.by_caller)
    name = writer.conclusion.value
    if len(writes) == 1:
        (value,) = writes
        return Conclusion(value, "stated", (both, Evidence("writes", {"name": name, "orientation": value})))
    if model is None:
        settle = (Settle("model", source.config.base_model_name or "BASE", "config"),)
        return Conclusion(None, "none", (both, Evidence("depends_on_model", {"name": name})), settle)
    about = {"name": name, "model_type": model.model_type}
    if len(_orientations_of(writer, model, patched=False)) == 1:
        settle = (Settle("written_by", f"peft=={writer.peft}", "unpatched"), Settle("orientation", "", "otherwise"))
        return Conclusion(None, "none", (both, Evidence("depends_on_patching", about)), settle)
    settle = (Settle("written_by", f"peft=={writer.peft},transformers==VERSION"),)
    if release_for(writer.peft).reads_swap_flag:
        # Naming a release means what it writes on its own, which that call changes.
        settle += (Settle("orientation", "", "patched"),)
    return Conclusion(None, "none", (both, Evidence("depends_on_transformers", about)), settle)


def _orientations_of(writer: Writer, model: BaseModel | None, *, patched: bool) -> frozenset[str]:
    """Those the writer's release can have written for this model, or for any."""
    assert writer.peft is not None  # noqa: S101
    return orientations(writer.peft, writer.transformers, model.model_type if model else None, patched=patched)


def _nesting(
    source: AdapterSource, possible: Readings, orientation: Conclusion, stated: Stated
) -> tuple[Conclusion, dict[str, Reading]]:
    """The conclusion, and every module's reading where it and the orientation are decided."""
    if not orientation.decided:
        names = {r.nesting for readings in possible.by_path.values() for r in readings}
        if len(names) == 1:
            return Conclusion(",".join(names.pop()), "certain", (Evidence("one_order"),)), {}
        return Conclusion(None, "none", (Evidence("orientation_open"),), orientation.settle), {}
    found: dict[str, Reading] = {}
    for path, readings in possible.by_path.items():
        fitting = [reading for reading in readings if reading.orientation == orientation.value]
        if len(fitting) > 1:
            options = [",".join(reading.nesting) for reading in fitting[:8]] + ["..."] * (len(fitting) > 8)
            if len(fitting[0].nesting) == 1:
                reason = Evidence("which_parameter", {"path": path, "options": ", ".join(options)})
                settle = Settle("nesting", options[0]) if source.base else Settle("model", "BASE")
                return Conclusion(None, "none", (reason,), (settle,)), {}
            reason = Evidence("which_nesting", {"path": path, "options": " or ".join(options)})
            return Conclusion(None, "none", (reason,), (Settle("nesting", options[0]),)), {}
        found[path] = fitting[0]
    nested = {reading.nesting for reading in found.values()}
    value = " | ".join(",".join(names) for names in sorted(nested))
    swapped = sum(not reading.in_parameter_order for reading in found.values())
    reason = Evidence("swapped", {"what": possible.evidence, "count": swapped}) if swapped else possible.evidence
    confidence = orientation.confidence if stated.nesting is None else "stated"
    return Conclusion(value, "certain" if source.stamp else confidence, (reason,)), found


def _packing(
    source: AdapterSource, counts: Mapping[str, tuple[int, ...]], writer: Writer, stated: Stated
) -> Conclusion:
    if stated.packing is not None:
        return Conclusion(stated.packing, "stated", (_SAID,))
    if all(slot.unfolded for module in source.modules for slot in module.slots):
        return Conclusion("either", "certain", (Evidence("packing_unfolded"),))
    written = " | ".join(sorted(set(writer.packings.values()))) or None
    if writer.marked:
        return Conclusion(written, "certain", (writer.packing_evidence,))
    pairs = [
        (slot.lora_B.name, count)
        for module in source.modules
        for slot, count in zip(module.slots, counts.get(module.path, ()), strict=False)
    ]
    infos = source.tensors.infos
    if len(counts) == len(source.modules) and all(count in (1, infos[name].shape[1]) for name, count in pairs):
        return Conclusion("either", "certain", (Evidence("packing_same"),))
    test = packing_evidence(_read(source, pairs[:: max(1, len(pairs) // _SAMPLED_MATRICES)]))
    either_way = tuple(Settle("packing", packing) for packing in PACKINGS)
    if written is None:
        reasons = (writer.packing_evidence, test.evidence)
        if test.packing is not None:
            return Conclusion(test.packing, "likely", reasons)
        if not any(lora_B.any() for lora_B, _ in _read(source, pairs)):
            return Conclusion("either", "certain", (Evidence("packing_zero"),))
        return Conclusion(None, "none", reasons, either_way)
    if test.hint not in (None, written):
        reasons = (writer.packing_evidence, Evidence("data_against", {"data": test.evidence}))
        return Conclusion(None, "none", reasons, either_way)
    return Conclusion(written, "stated", (writer.packing_evidence, test.evidence))


def _read(source: AdapterSource, pairs: Sequence[tuple[str, int]]) -> Iterator[tuple[Tensor, int]]:
    """(lora_B, E) of each pair, one matrix in memory at a time."""
    for name, count in pairs:
        with source.tensors.reading([name]) as get:
            yield get[name], count
