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
from .conclusions import Conclusion
from .orientations import orientations
from .packing import packing_evidence
from .shapes import Reading, Readings, expert_counts, readings_by_shape, readings_by_stamp
from .source import AdapterSource
from .stamp import Stamp
from .stated import Stated
from .writer import SAID_BY_CALLER, Writer, find_writer

__all__ = ["Decision", "decide"]

_NOT_FUSED = Conclusion("not applicable", "certain", ("the experts' LoRA is not in PEFT's fused form",))
_SAMPLED_MATRICES = 8  # of lora_B, read for the test of the packing


@dataclass(frozen=True)
class Decision:
    """What a file holds.

    Attributes:
        writer, orientation, packing, nesting: Conclusions, see `Inspection`.
        readings: Path of a fused module -> how it is read; empty unless orientation and nesting are decided.
        expert_counts: Path of a fused module -> E of each of its slots, innermost first, where it is known.
        packings: Parameter -> packing of lora_B where Unsloth packed them differently; see `packing_of`.
        stamp: This library's own, if the file has one.
        peft: The PEFT release whose layout rule the file follows, if known.
    """

    writer: Conclusion
    orientation: Conclusion
    packing: Conclusion
    nesting: Conclusion
    readings: Mapping[str, Reading] = field(default_factory=dict)
    expert_counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    packings: Mapping[str | None, str] = field(default_factory=dict)
    stamp: Stamp | None = None
    peft: str | None = None

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
                f"its {name} is not settled: {'; '.join(conclusion.evidence)}. Settle it with {conclusion.settle}."
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
    stamp = source.stamp
    writer = find_writer(source, stated)
    if source.form != "fused":
        return Decision(writer.conclusion, _NOT_FUSED, _NOT_FUSED, _NOT_FUSED, stamp=stamp, peft=writer.peft)
    if stamp is None:
        possible = readings_by_shape(source, stated.nesting)
    else:
        possible = readings_by_stamp(source, stamp)
        for path, (first, *_) in possible.by_path.items():
            there, said = first.nesting, stated.nesting
            if said is not None and len(there) > 1 and sorted(there) != sorted(said):
                raise AdapterError(f"nesting is {','.join(said)}; the stamp has {','.join(there)} at {path!r}.")
    oriented = _orientation(source, possible, writer, stated)
    nested, readings = _nesting(source, possible, oriented, stated)
    counts = expert_counts(source, possible)
    packed = _packing(source, counts, writer, stated)
    named = _with_remark(writer, oriented, source.base)
    return Decision(named, oriented, packed, nested, readings, counts, writer.packings, stamp, writer.peft)


def _orientation(source: AdapterSource, readings: Readings, writer: Writer, stated: Stated) -> Conclusion:
    model, possible, said = source.base, readings.orientations, stated.orientation
    if said is not None:
        if said not in possible:
            raise AdapterError(
                f"orientation is {said!r}, but {readings.evidence} fit {' or '.join(sorted(possible))} alone."
            )
        return Conclusion(said, "stated", (SAID_BY_CALLER,))
    if len(possible) == 1:
        (value,) = possible
        text = f"{readings.evidence} fit {value} alone" if source.stamp is None else readings.evidence
        return Conclusion(value, "likely" if readings.likely else "certain", (text,))
    both = f"{readings.evidence} fit both orientations"
    if writer.peft is None:
        flag = "--written-by peft==VERSION" if model else "--model BASE, or --written-by peft==VERSION, or both"
        return Conclusion(None, "none", (both, "no PEFT release is known to have written the file"), flag)
    # A caller who names the release means what it writes on its own.
    writes = _orientations_of(writer, model, patched=not writer.by_caller)
    name = writer.conclusion.value
    if len(writes) == 1:
        (value,) = writes
        return Conclusion(value, "stated", (both, f"{name} writes {value} ones for this model"))
    if model is None:
        flag = f"--model {source.config.base_model_name or 'BASE'} (the base model's config.json)"
        why = f"what {name} writes depends on the base model"
        return Conclusion(None, "none", (both, why), flag)
    if len(_orientations_of(writer, model, patched=False)) == 1:
        why = f"what {name} writes for {model.model_type} is changed by the load_adapter() of transformers 5.0 to 5.12"
        flag = f"--written-by peft=={writer.peft} if that was not called before, else --orientation"
        return Conclusion(None, "none", (both, why), flag)
    why = f"what {name} writes for {model.model_type} depends on the transformers release"
    flag = f"--written-by peft=={writer.peft},transformers==VERSION"
    if release_for(writer.peft).reads_swap_flag:
        # Naming a release means what it writes on its own, which that call changes.
        flag += ", or --orientation if load_adapter() of transformers 5.0 to 5.12 was called before"
    return Conclusion(None, "none", (both, why), flag)


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
            return Conclusion(",".join(names.pop()), "certain", ("only one parameter order is possible",)), {}
        evidence = ("it follows from the orientation, which is not settled",)
        return Conclusion(None, "none", evidence, orientation.settle), {}
    found: dict[str, Reading] = {}
    for path, readings in possible.by_path.items():
        fitting = [reading for reading in readings if reading.orientation == orientation.value]
        if len(fitting) > 1:
            options = " or ".join(",".join(reading.nesting) for reading in fitting)
            if len(fitting[0].nesting) == 1:
                evidence = (f"the one LoRA of {path!r} may be that of {options.replace(' or ', ', ')}",)
                return Conclusion(None, "none", evidence, "--model BASE"), {}
            evidence = (f"the shapes of {path!r} fit the nestings {options} (innermost first)",)
            return Conclusion(None, "none", evidence, f"--nesting {','.join(fitting[0].nesting)}"), {}
        found[path] = fitting[0]
    nested = {reading.nesting for reading in found.values()}
    value = " | ".join(",".join(names) for names in sorted(nested))
    swapped = [path for path, reading in found.items() if not reading.in_parameter_order]
    text = possible.evidence
    if swapped:
        text += f"; {len(swapped)} modules are nested against the order of their parameters"
    confidence = (
        "stated" if stated.nesting is not None or orientation.confidence == "stated" else orientation.confidence
    )
    return Conclusion(value, "certain" if source.stamp else confidence, (text,)), found


def _packing(
    source: AdapterSource, counts: Mapping[str, tuple[int, ...]], writer: Writer, stated: Stated
) -> Conclusion:
    if stated.packing is not None:
        return Conclusion(stated.packing, "stated", (SAID_BY_CALLER,))
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
        return Conclusion("either", "certain", ("with one expert or rank 1 both packings are the same",))
    test = packing_evidence(_read(source, pairs[:: max(1, len(pairs) // _SAMPLED_MATRICES)]))
    either_way = "--packing rank_major, or --packing grouped"
    if written is None:
        reasons = (writer.packing_evidence or "nothing in the config says how lora_B is packed", test.evidence)
        if test.packing is not None:
            return Conclusion(test.packing, "likely", reasons)
        if not any(lora_B.any() for lora_B, _ in _read(source, pairs)):
            return Conclusion("either", "certain", ("every lora_B is zero, the same under both packings",))
        return Conclusion(None, "none", reasons, either_way)
    if test.hint not in (None, written):
        reasons = (writer.packing_evidence, f"but the data speak against it: {test.evidence}")
        return Conclusion(None, "none", reasons, either_way)
    return Conclusion(written, "stated", (writer.packing_evidence, test.evidence))


def _read(source: AdapterSource, pairs: Sequence[tuple[str, int]]) -> Iterator[tuple[Tensor, int]]:
    """(lora_B, E) of each pair, one matrix in memory at a time."""
    for name, count in pairs:
        with source.tensors.reading([name]) as get:
            yield get[name], count


def _with_remark(writer: Writer, orientation: Conclusion, model: BaseModel | None) -> Conclusion:
    """The writer's conclusion; with a remark where the shapes show what its release does not write on its own."""
    conclusion = writer.conclusion
    if (
        writer.peft is None
        or orientation.value is None
        or orientation.value in _orientations_of(writer, model, patched=False)
    ):
        return conclusion
    remark = (
        f"its {orientation.value} orientation is not what {conclusion.value} writes on its own: saved again by another "
        "release, or made in a process that transformers 5.0 to 5.12 had patched"
    )
    return replace(conclusion, evidence=(*conclusion.evidence, remark))
