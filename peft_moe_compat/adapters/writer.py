"""Who wrote an adapter, and what follows from that about its layout: from stamps, markers and the config it left."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterFileError, UnsupportedPeftError
from ..families import family
from ..releases import AUTOMODEL_LAYOUTS, RULES, parse_releases, release_for
from .base_model import BaseModel
from .conclusions import Conclusion
from .files import show
from .source import AdapterSource
from .stamp import Stamp

__all__ = ["SAID_BY_CALLER", "UNSLOTH_DETAIL", "UNSLOTH_LAYOUT", "Writer", "find_writer"]

SAID_BY_CALLER = "said by the caller"

# Unsloth's markers in adapter_config.json, at its top or under auto_mapping, and their words for the packings. Source:
# unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py.
UNSLOTH_LAYOUT, UNSLOTH_DETAIL, _UNSLOTH_FINGERPRINT = "lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"
_UNSLOTH_PACKINGS = {"grouped_by_expert": "grouped", "rank_major": "rank_major"}

# NeMo Automodel's own file beside the adapter, and its entry for the layout, see `releases.AUTOMODEL_LAYOUTS`.
AUTOMODEL_FILE, _AUTOMODEL_KEY = "automodel_peft_config.json", "paramwrapper_layout"

# Fields that PEFT 0.17 dumps with every LoraConfig; it was the last that did not add its own version.
_PEFT_0_17_FIELDS = {"target_parameters", "trainable_token_indices", "use_qalora", "corda_config", "auto_mapping"}


@dataclass(frozen=True)
class Writer:
    """Who wrote the file.

    Attributes:
        conclusion: Its name, as far as it is known, and the evidence.
        peft: The PEFT release whose layout rule the file follows; None where nobody says.
        transformers: The transformers release beside it; None where nobody says.
        packings: What the writer says or implies of lora_B's packing: parameter -> packing, under None for all others.
        packing_evidence: Why.
        marked: Whether that comes from a marker made for this purpose.
        by_caller: Whether the caller named the release.
    """

    conclusion: Conclusion
    peft: str | None = None
    transformers: str | None = None
    packings: Mapping[str | None, str] = field(default_factory=dict)
    packing_evidence: str = ""
    marked: bool = False
    by_caller: bool = False


def find_writer(source: AdapterSource, stamp: Stamp | None, written_by: str | None, model: BaseModel | None) -> Writer:
    """The writer of an adapter. What the caller says (`written_by`) wins over everything but the library's own stamp.

    Raises:
        AdapterFileError: A marker or version in the file makes no sense.
        UnsupportedPeftError: `written_by` names no release.
    """
    if stamp is not None:
        text = f"stamped by peft_moe_compat, PEFT {stamp.peft}, transformers {stamp.transformers or 'of any release'}"
        conclusion = Conclusion(f"PEFT {stamp.peft}", "certain", (text,))
        return Writer(conclusion, stamp.peft, stamp.transformers, {None: stamp.packing}, text, marked=True)
    if written_by is None and AUTOMODEL_FILE in source.side_files:
        return _automodel(source.side_files[AUTOMODEL_FILE])
    unsloth = _unsloth(source.config, model)
    peft, transformers, conclusion = _release(source.config, written_by)
    by_caller = written_by is not None
    if unsloth is not None:
        name = f"Unsloth, {conclusion.value}" if conclusion.value else "Unsloth"
        named = Conclusion(name, "stated", (*conclusion.evidence, unsloth.evidence))
        return Writer(named, peft, transformers, unsloth.packings, unsloth.evidence, unsloth.marked, by_caller)
    if peft is None:
        return Writer(conclusion)
    text = f"PEFT {peft} packs lora_B's columns as '(r E)', as every release does"
    return Writer(conclusion, peft, transformers, {None: "rank_major"}, text, by_caller=by_caller)


def _release(config: Mapping[str, Any], written_by: str | None) -> tuple[str | None, str | None, Conclusion]:
    """(PEFT, transformers, conclusion), from what the caller says or the config."""
    if written_by is not None:
        peft, transformers = parse_releases(written_by)
        beside = f", transformers {transformers}" if transformers else ""
        return peft, transformers, Conclusion(f"PEFT {peft}{beside}", "stated", (SAID_BY_CALLER,))
    version = config.get("peft_version")
    if version is not None:
        try:
            release_for(str(version))
        except UnsupportedPeftError as error:
            raise AdapterFileError(f"adapter_config.json has peft_version {show(version)}: {error}") from None
        text = f"peft_version is {version!r} in adapter_config.json"
        return str(version), None, Conclusion(f"PEFT {version}", "stated", (text,))
    if config.keys() >= _PEFT_0_17_FIELDS:
        text = "adapter_config.json has the fields of PEFT 0.17, and no peft_version, as then"
        return str(RULES[0].since), None, Conclusion("PEFT 0.17", "likely", (text,))
    text = "adapter_config.json has neither a peft_version nor the fields that PEFT 0.17 writes"
    return None, None, Conclusion(None, "none", (text,), "--written-by peft==VERSION")


@dataclass(frozen=True)
class _Unsloth:
    """What Unsloth left in a config."""

    packings: Mapping[str | None, str]
    evidence: str
    marked: bool


def _unsloth(config: Mapping[str, Any], model: BaseModel | None) -> _Unsloth | None:
    """What Unsloth left in the config, None where it left nothing.

    Raises:
        AdapterFileError: Its markers contradict each other or are unknown words.
    """
    auto_mapping = config.get("auto_mapping")
    auto_mapping = auto_mapping if isinstance(auto_mapping, dict) else {}
    found: dict[str | None, str] = {}
    for place in (config, auto_mapping):
        for parameter, value in _markers(place):
            if not isinstance(value, str) or value not in _UNSLOTH_PACKINGS:
                raise AdapterFileError(
                    f"Unsloth's {UNSLOTH_LAYOUT} is {show(value)}; one of {', '.join(_UNSLOTH_PACKINGS)} was expected. "
                    "Was the file written by a newer Unsloth?"
                )
            if found.setdefault(parameter, _UNSLOTH_PACKINGS[value]) != _UNSLOTH_PACKINGS[value]:
                raise AdapterFileError(f"Unsloth's markers contradict each other: {UNSLOTH_LAYOUT} in {show(config)}.")
    if found:
        said = ", ".join(f"{value} for {parameter or 'all'}" for parameter, value in found.items())
        return _Unsloth(found, f"{UNSLOTH_LAYOUT} says {said}", marked=True)
    if not (auto_mapping.get(_UNSLOTH_FINGERPRINT) and config.get("target_parameters")):
        return None
    text = f"auto_mapping has {_UNSLOTH_FINGERPRINT!r} and no marker: Unsloth before 2026-09"
    library = re.match(r"transformers\.models\.(\w+)\.", str(auto_mapping.get("parent_library")))
    model_type = model.model_type if model is not None else library and library[1]
    if model_type is None:
        return _Unsloth({}, f"{text}, whose packing depends on the family of the base model", marked=False)
    if family(model_type).unsloth_grouped:
        return _Unsloth({None: "grouped"}, f"{text}, which groups the columns of {model_type} by expert", marked=False)
    return _Unsloth({None: "rank_major"}, f"{text}, which left {model_type} to PEFT's own forward", marked=False)


def _markers(place: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    """(parameter or None, word) of every marker at one place."""
    if UNSLOTH_LAYOUT in place:
        yield None, place[UNSLOTH_LAYOUT]
    detail = place.get(UNSLOTH_DETAIL)
    parameters = detail.get("parameters") if isinstance(detail, dict) else None
    for parameter, entry in (parameters if isinstance(parameters, dict) else {}).items():
        if isinstance(entry, dict):
            yield parameter, entry.get(UNSLOTH_LAYOUT)


def _automodel(content: Mapping[str, Any]) -> Writer:
    layout = content.get(_AUTOMODEL_KEY)
    if not isinstance(layout, str | None) or layout not in AUTOMODEL_LAYOUTS:
        known = ", ".join(str(name) for name in AUTOMODEL_LAYOUTS if name)
        raise AdapterFileError(
            f"{AUTOMODEL_FILE} has {_AUTOMODEL_KEY} {show(layout)}; one of {known} was expected. Is the file damaged, "
            "or its writer newer than this package?"
        )
    name, text = (
        ("NeMo Automodel 0.4 to 0.6", f"{AUTOMODEL_FILE} without {_AUTOMODEL_KEY}")
        if layout is None
        else ("NeMo Automodel >= 0.7", f"{_AUTOMODEL_KEY} is {layout!r} in {AUTOMODEL_FILE}")
    )
    peft = AUTOMODEL_LAYOUTS[layout]
    packs = f"{name} packs as PEFT {peft} does"
    return Writer(Conclusion(name, "stated", (text,)), peft, None, {None: "rank_major"}, packs)
