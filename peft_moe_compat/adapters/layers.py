"""What the shapes of all layers together allow: which orientation, and which nesting in each kind of module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import AdapterError, AdapterFileError
from ..layout import ORIENTATIONS
from .base_model import BaseModel
from .names import ExpertsKeys, role_of
from .ranks import lora_rank
from .shapes import Reading, SlotShape, nestings, parameter_order, possible_readings, slot_counts
from .source import AdapterSource
from .stamp import Stamp

__all__ = ["Votes", "expert_counts", "stamped", "vote"]


@dataclass(frozen=True)
class Votes:
    """What the shapes allow.

    Attributes:
        readings: Path -> possible readings; those of modules with the same candidates are already intersected.
        evidence: In words.
        likely: Whether a size from elsewhere in the file was needed, which is no proof.
    """

    readings: Mapping[str, tuple[Reading, ...]]
    evidence: str
    likely: bool = False

    @property
    def orientations(self) -> set[str]:
        """Those that every module allows."""
        sets = [{reading.orientation for reading in readings} for readings in self.readings.values()]
        return set.intersection(*sets) if sets else set(ORIENTATIONS)


def vote(
    source: AdapterSource,
    modules: Sequence[ExpertsKeys],
    shapes: Mapping[str, tuple[SlotShape, ...]],
    model: BaseModel | None,
    nesting: Sequence[str] | None,
) -> Votes:
    """All modules together. Modules with the same candidates share one nesting."""
    candidates = {module.path: _candidates(source, module, model, nesting) for module in modules}

    def possible(hidden_size: int | None) -> dict[str, tuple[Reading, ...]]:
        by_path = {
            module.path: possible_readings(
                module,
                shapes[module.path],
                source.config,
                candidates[module.path],
                model=model,
                hidden_size=hidden_size,
            )
            for module in modules
        }
        shared: dict[tuple[tuple[str, ...], ...], set[Reading]] = {}
        for path, readings in by_path.items():
            kind = tuple(candidates[path])
            shared[kind] = shared.get(kind, set(readings)) & set(readings)
        return {p: tuple(r for r in by_path[p] if r in shared[tuple(candidates[p])]) for p in by_path}

    votes = Votes(possible(None), f"shapes of {len(modules)} module{'s' * (len(modules) > 1)}")
    if not votes.orientations:
        raise AdapterFileError(_no_reading(source, modules, shapes, candidates, model))
    if model is None and len(votes.orientations) > 1 and (hidden := _hidden_size(source)) is not None:
        narrowed = Votes(possible(hidden), f"{votes.evidence} and hidden size {hidden} of the attention LoRA", True)
        if narrowed.orientations:
            return narrowed
    return votes


def _candidates(
    source: AdapterSource, module: ExpertsKeys, model: BaseModel | None, nesting: Sequence[str] | None
) -> list[tuple[str, ...]]:
    found = nestings(module, source.config, tuple(model.parameters.values()) if model else ())
    if nesting is None or len(module.slots) == 1:
        return found
    if tuple(nesting) not in found:
        options = " or ".join(",".join(candidate) for candidate in found)
        raise AdapterError(f"nesting is {','.join(nesting)}; {options} was expected for {module.path!r}.")
    return [tuple(nesting)]


def _no_reading(
    source: AdapterSource,
    modules: Sequence[ExpertsKeys],
    shapes: Mapping[str, tuple[SlotShape, ...]],
    candidates: Mapping[str, list[tuple[str, ...]]],
    model: BaseModel | None,
) -> str:
    """The message for shapes that no reading explains."""
    alone = {
        module.path: possible_readings(module, shapes[module.path], source.config, candidates[module.path], model=model)
        for module in modules
    }
    stuck = [path for path, readings in alone.items() if not readings]
    if not stuck:
        first, *others = alone
        apart = next(
            (path for path in others if not set(alone[first]) & set(alone[path])), others[-1] if others else first
        )
        return (
            f"The layers of {source.folder} disagree: the shapes of {first!r} fit {_names(alone[first])}, those of "
            f"{apart!r} {_names(alone[apart])}. Was the file put together from two adapters?"
        )
    path = stuck[0]
    sizes = ", ".join(f"lora_A {s.rows} x {s.p} and lora_B {s.q} x {s.rows}" for s in shapes[path])
    ranks = sorted({lora_rank(source.config, f"{path}.{name}") for name in candidates[path][0]})
    expected = f"no stack of {model.described()}" if model else "no experts module"
    return (
        f"The LoRA of {path!r} ({sizes}, rank {', '.join(map(str, ranks))}) fits {expected} in any orientation or "
        "nesting. Was the adapter trained with another num_experts or rank, or for another model?"
    )


def _names(readings: Sequence[Reading]) -> str:
    return " or ".join(sorted({reading.orientation for reading in readings}))


def _hidden_size(source: AdapterSource) -> int | None:
    """H as the LoRA on attention projections shows it; None where there is none, or several."""
    found = set()
    for name in source.keys.other:
        shape = source.tensors.infos[name].shape
        if "vision" in name or "visual" in name or len(shape) != 2:
            continue
        if name.endswith(tuple(f".{p}_proj.lora_A.weight" for p in "qkv")):
            found.add(shape[1])
        elif name.endswith(".o_proj.lora_B.weight"):
            found.add(shape[0])
    return found.pop() if len(found) == 1 else None


def stamped(
    source: AdapterSource,
    stamp: Stamp,
    modules: Sequence[ExpertsKeys],
    shapes: Mapping[str, tuple[SlotShape, ...]],
    model: BaseModel | None,
) -> Votes:
    """What the stamp says of each module, once it is known to speak of this file, and the file of this model."""
    readings = {}
    for module in modules:
        said = stamp.modules.get(module.path)
        sizes = () if said is None else tuple(shape.features(said.orientation) for shape in shapes[module.path])
        if said is None or sizes != said.features:
            raise AdapterFileError(
                f"The stamp of peft_moe_compat in this file does not describe the LoRA of {module.path!r}: it says "
                f"{said.features if said else 'nothing'} (in, out), the tensors {sizes}. Was the file edited?"
            )
        counts = slot_counts(module.path, said.nesting, shapes[module.path], source.config)
        if counts is None or said.num_experts not in counts:
            raise AdapterFileError(
                f"The stamp of peft_moe_compat in this file says {said.num_experts} experts for {module.path!r}, and "
                f"with the ranks in adapter_config.json it has {counts or 'no whole number'}. Was one of them edited?"
            )
        for name, count, features in zip(said.nesting, counts, said.features, strict=True):
            if model is not None:
                model.require(module.path, name, role_of(module.path, name), count, features)
        in_order = said.nesting == parameter_order(module.path, said.nesting)
        readings[module.path] = (Reading(said.orientation, said.nesting, in_order),)
    return Votes(readings, "the stamp of peft_moe_compat")


def expert_counts(
    source: AdapterSource, votes: Votes, shapes: Mapping[str, tuple[SlotShape, ...]]
) -> dict[str, tuple[int, ...]]:
    """Path -> E of each slot, where every possible reading gives the same."""
    found = {}
    for path, readings in votes.readings.items():
        options = set()
        for reading in readings:
            options.add(tuple(slot_counts(path, reading.nesting, shapes[path], source.config) or ()))
        if len(options) == 1:
            found[path] = options.pop()
    return found
