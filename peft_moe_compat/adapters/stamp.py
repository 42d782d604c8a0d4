"""What this package writes into the metadata of an adapter_model.safetensors: how its experts' LoRA is laid out.

Stock PEFT of every release, and every other reader, ignores the entry; stock PEFT drops it when it saves the adapter
again, so it never speaks of a file it was not made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AdapterFileError
from ..layout import ORIENTATIONS, PACKINGS

__all__ = ["STAMP_KEY", "ModuleStamp", "Stamp", "read_stamp"]

STAMP_KEY = "peft_moe_compat"


@dataclass(frozen=True)
class ModuleStamp:
    """Layout of one fused experts module.

    Attributes:
        num_experts: E.
        nesting: Parameters, innermost wrapper first.
        orientation: Of each of them, `"linear"` or `"reversed"`.
        features: (in, out) of each of them.
        joined: Of the gate and up projection, where they were joined block-diagonally: their two ranks.
    """

    num_experts: int
    nesting: tuple[str, ...]
    orientation: str
    features: tuple[tuple[int, int], ...]
    joined: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stamp:
    """How a file's LoRA on fused experts is laid out.

    Attributes:
        peft, transformers: The releases it is laid out for; transformers is None where it does not matter.
        packing: Of lora_B's columns.
        modules: By their path.
    """

    peft: str
    transformers: str | None
    packing: str
    modules: Mapping[str, ModuleStamp]

    def to_metadata(self) -> dict[str, str]:
        """The metadata entry."""
        content = asdict(self)
        for module in content["modules"].values():
            if module["joined"] is None:
                del module["joined"]
        return {STAMP_KEY: json.dumps(content, separators=(",", ":"))}


def read_stamp(metadata: Mapping[str, str]) -> Stamp | None:
    """The stamp in a file's metadata, None where there is none.

    Raises:
        AdapterFileError: There is one, and it is damaged.
    """
    if STAMP_KEY not in metadata:
        return None
    try:
        content = json.loads(metadata[STAMP_KEY])
        modules = {path: _module(entry) for path, entry in content["modules"].items()}
        beside = content.get("transformers")
        stamp = Stamp(str(content["peft"]), beside and str(beside), content["packing"], modules)
        if stamp.packing not in PACKINGS:
            raise ValueError(f"packing {stamp.packing!r}")  # noqa: TRY301
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"The metadata entry {STAMP_KEY!r} is damaged ({type(error).__name__}: {error}). Was the file edited? "
            "Remove the entry, or save the adapter again."
        ) from None
    return stamp


def _module(entry: Mapping[str, Any]) -> ModuleStamp:
    features = tuple((int(fan_in), int(fan_out)) for fan_in, fan_out in entry["features"])
    nesting = tuple(str(name) for name in entry["nesting"])
    if entry["orientation"] not in ORIENTATIONS or len(features) != len(nesting):
        raise ValueError(f"orientation {entry['orientation']!r}, {len(features)} sizes for {len(nesting)} parameters")
    joined = (int(entry["joined"][0]), int(entry["joined"][1])) if entry.get("joined") else None
    return ModuleStamp(int(entry["num_experts"]), nesting, entry["orientation"], features, joined)
