"""What `inspect_adapter` says of an adapter, as data. The JSON form has the same names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SCHEMA_VERSION", "Conclusion", "ExpertsSummary", "Inspection", "ProjectionSummary", "ReaderVerdict"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Conclusion:
    """One thing concluded about a file.

    Attributes:
        value: What was concluded; None where the evidence does not settle it.
        confidence: `"certain"` where the file's own shapes, keys or stamp leave nothing else, `"stated"` where the
            caller or the writer's release says so, `"likely"` where the data does, `"none"` where it is undecided.
        evidence: What speaks for the value, and against it.
        settle: Where undecided: the flag that would settle it.
    """

    value: str | None
    confidence: str
    evidence: tuple[str, ...]
    settle: str = ""

    @property
    def decided(self) -> bool:
        return self.value is not None


@dataclass(frozen=True)
class ProjectionSummary:
    """One adapted projection of an experts module.

    Attributes:
        name: Parameter or linear, as the file or its config names it; None where that is undecided.
        rank: Of one expert; None where it differs between experts or is undecided.
        scaling: Factor of the update; None likewise.
        in_features, out_features: None where the orientation is undecided.
    """

    name: str | None
    rank: int | None
    scaling: float | None
    in_features: int | None
    out_features: int | None


@dataclass(frozen=True)
class ExpertsSummary:
    """One experts module: its path in the model, the form of its LoRA, and its projections, innermost first."""

    path: str
    form: str
    num_experts: int | None
    projections: tuple[ProjectionSummary, ...]


@dataclass(frozen=True)
class ReaderVerdict:
    """What a reader does with the file as it is.

    Attributes:
        verdict: `"reads"`, `"wrong"` (without an error), `"fails"` or `"unknown"`.
        why: The reason, and for anything but `"reads"` what helps.
    """

    verdict: str
    why: str


@dataclass(frozen=True)
class Inspection:
    """What an adapter holds, who wrote it, what its readers would do with it, and how sure all of that is.

    Attributes:
        path: Of the folder.
        files: Names of the files read.
        num_tensors, total_bytes: Of all tensors.
        dtypes: Of the experts' LoRA.
        form: `"fused"`, `"per_expert"`, `"stacked"`, or `"none"` where there is no LoRA on routed experts.
        model_type: Of the base model, where its config was given.
        writer, orientation, packing, nesting: Conclusions. Orientation is `"linear"` or `"reversed"`, packing
            `"rank_major"`, `"grouped"` or `"either"`, nesting the parameters from the innermost wrapper outwards;
            `"not applicable"` for files that are not fused.
        modules: The experts modules, in the order of the file.
        other_tensors, other_bytes: What the file holds besides, all of it carried along unchanged.
        readers: Reader -> what it does with the file.
        notes: Whatever else is worth knowing.
    """

    path: str
    files: tuple[str, ...]
    num_tensors: int
    total_bytes: int
    dtypes: tuple[str, ...]
    form: str
    model_type: str | None
    writer: Conclusion
    orientation: Conclusion
    packing: Conclusion
    nesting: Conclusion
    modules: tuple[ExpertsSummary, ...]
    other_tensors: int
    other_bytes: int
    readers: dict[str, ReaderVerdict]
    notes: tuple[str, ...] = ()

    @property
    def undecided(self) -> tuple[str, ...]:
        """Which of orientation, packing and nesting the evidence does not settle."""
        return tuple(name for name in ("orientation", "packing", "nesting") if not getattr(self, name).decided)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, `undecided`, and `schema_version`, which counts changes of that form."""
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "undecided": self.undecided,
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)
