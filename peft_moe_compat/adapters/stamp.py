"""What this package writes into the metadata of an adapter_model.safetensors: how its experts' LoRA is laid out.

Stock PEFT of every release, and every other reader, ignores the entry; stock PEFT drops it when it saves the adapter
again, so it never speaks of a file it was not made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AdapterFileError, UnsupportedPeftError
from ..layout import ORIENTATIONS, PACKINGS
from ..releases import parse_version, release_for
from .files import parse_json, show

__all__ = [
    "STAMP_KEY",
    "ModuleStamp",
    "Stamp",
    "config_entry",
    "numbers_of",
    "numbers_said",
    "read_stamp",
]

STAMP_KEY = "peft_moe_compat"
_CONFIG_KEY = "peft_moe_compat.config"  # what a stamp has as `config`, in files that have no layout to tell of
# Fields of adapter_config.json that say what the tensors mean, and do not show in them.
_NUMBERS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


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
        config: What the adapter_config.json beside it says, see `numbers_of`; None in files that do not tell.
    """

    peft: str
    transformers: str | None
    packing: str
    modules: Mapping[str, ModuleStamp]
    config: Mapping[str, Any] | None = None

    def to_metadata(self) -> dict[str, str]:
        """The metadata entry."""
        content = asdict(self)
        if self.config is None:
            del content["config"]
        for module in content["modules"].values():
            if module["joined"] is None:
                del module["joined"]
        return {STAMP_KEY: json.dumps(content, separators=(",", ":"))}


def numbers_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of ranks and alphas; nothing, None, empty and False are the same."""
    return {name: config.get(name) or None for name in _NUMBERS}


def config_entry(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata entry of a file without a stamp."""
    return {_CONFIG_KEY: json.dumps(numbers_of(config), separators=(",", ":"))}


def numbers_said(metadata: Mapping[str, str], stamp: Stamp | None) -> Mapping[str, Any] | None:
    """What a file says of the config it was saved with, see `numbers_of`; None where it does not.

    Raises:
        AdapterFileError: What it says is damaged.
    """
    if stamp is not None or _CONFIG_KEY not in metadata:
        return None if stamp is None else stamp.config
    return parse_json(metadata[_CONFIG_KEY].encode(), f"The metadata entry {_CONFIG_KEY!r}")


def read_stamp(metadata: Mapping[str, str]) -> Stamp | None:
    """The stamp in a file's metadata, None where there is none.

    Raises:
        AdapterFileError: There is one, and it is damaged.
    """
    if STAMP_KEY not in metadata:
        return None
    try:
        content: Any = parse_json(metadata[STAMP_KEY].encode(), "it")
        peft, beside, packing, modules = (content.get(name) for name in ("peft", "transformers", "packing", "modules"))
        _require(isinstance(peft, str), "peft", peft)
        release_for(peft)
        _require(beside is None or isinstance(beside, str), "transformers", beside)
        if beside is not None:
            parse_version(beside)
        _require(isinstance(packing, str) and packing in PACKINGS, "packing", packing)
        _require(isinstance(modules, dict), "modules", modules)
        config = content.get("config")
        _require(config is None or isinstance(config, dict), "config", config)
        return Stamp(peft, beside, packing, {path: _module(entry) for path, entry in modules.items()}, config)
    except (AdapterFileError, UnsupportedPeftError) as error:
        raise AdapterFileError(
            f"The metadata entry {STAMP_KEY!r} is damaged: {error} Was the file edited? Remove the entry, or save the "
            "adapter again."
        ) from None


def _require(fits: bool, what: str, value: object) -> None:
    if not fits:
        raise AdapterFileError(f"Its {what} is {show(value)}.")


def _sizes(values: object, count: int) -> bool:
    """Whether these are so many positive numbers that a tensor can have."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) is int and 0 < value < 2**31 for value in values)
    )


def _module(entry: Any) -> ModuleStamp:
    _require(isinstance(entry, dict), "entry of a module", entry)
    names = ("num_experts", "nesting", "orientation", "features", "joined")
    count, nesting, orientation, features, joined = map(entry.get, names)
    _require(_sizes([count], 1), "num_experts", count)
    named = isinstance(nesting, list) and nesting and all(isinstance(name, str) and name for name in nesting)
    _require(bool(named) and len(set(nesting)) == len(nesting) <= 64, "nesting", nesting)
    _require(isinstance(orientation, str) and orientation in ORIENTATIONS, "orientation", orientation)
    fits = isinstance(features, list) and len(features) == len(nesting)
    _require(fits and all(_sizes(pair, 2) for pair in features), "features", features)
    _require(joined is None or _sizes(joined, 2), "joined", joined)
    sizes = tuple((fan_in, fan_out) for fan_in, fan_out in features)
    return ModuleStamp(count, tuple(nesting), orientation, sizes, joined and (joined[0], joined[1]))
