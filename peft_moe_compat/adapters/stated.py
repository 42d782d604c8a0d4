"""What the caller says of an adapter: one value, checked where it is made, that goes through opening and deciding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..layout import ORIENTATIONS, PACKINGS
from ..releases import parse_releases
from .base_model import BaseModel

__all__ = ["Stated"]


@dataclass(frozen=True)
class Stated:
    """What the caller says; None where nothing is said.

    Attributes:
        model: The base model's config: a folder, a `config.json`, a Hub id, a dict, or facts already read.
        written_by: `peft==VERSION` or `peft==VERSION,transformers==VERSION`.
        orientation: `"linear"` or `"reversed"`; shapes that speak against it are an error.
        packing: `"rank_major"` or `"grouped"`.
        nesting: Parameters, innermost wrapper first; or their names with commas between them.

    Raises:
        AdapterError: `orientation` or `packing` is no possible answer.
        UnsupportedPeftError: `written_by` names no PEFT release with expert LoRA.
    """

    model: str | Path | Mapping[str, Any] | BaseModel | None = None
    written_by: str | None = None
    orientation: str | None = None
    packing: str | None = None
    nesting: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, said, known in (("packing", self.packing, PACKINGS), ("orientation", self.orientation, ORIENTATIONS)):
            if said is not None and said not in known:
                raise AdapterError(f"{name} is {said!r}; one of {', '.join(known)} was expected.")
        if self.written_by is not None:
            parse_releases(self.written_by)
        if self.nesting is not None:
            names = self.nesting.split(",") if isinstance(self.nesting, str) else self.nesting
            object.__setattr__(self, "nesting", tuple(names))

    @property
    def releases(self) -> tuple[str | None, str | None]:
        """PEFT and transformers, as `written_by` names them."""
        return (None, None) if self.written_by is None else parse_releases(self.written_by)
