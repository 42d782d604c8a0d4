"""Who wrote an adapter, and what follows from that about its layout: from stamps, markers and the config it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFileError, UnsupportedPeftError
from ..layout import PACKINGS
from ..releases import parse_releases, release_for
from .files import show
from .inspection import Conclusion
from .source import AdapterSource
from .stamp import Stamp

__all__ = ["SAID_BY_CALLER", "UNSLOTH_DETAIL", "UNSLOTH_LAYOUT", "Writer", "find_writer"]

SAID_BY_CALLER = "said by the caller"

# Unsloth's markers in adapter_config.json, at its top or under auto_mapping, and their words for the packings. Source:
# unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py.
UNSLOTH_LAYOUT, UNSLOTH_DETAIL, _UNSLOTH_FINGERPRINT = "lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"
_UNSLOTH_PACKINGS = {"grouped_by_expert": "grouped", "rank_major": "rank_major"}

# NeMo Automodel's own file beside the adapter, its entry for the layout, and the PEFT release whose rule each value
# names. Without the entry (0.4 to 0.6) it is the older one. Source: nemo_automodel 0.7, components/moe.
AUTOMODEL_FILE, _AUTOMODEL_KEY = "automodel_peft_config.json", "paramwrapper_layout"
_AUTOMODEL_LAYOUTS = {"peft-0.18": "0.18.1", "peft-0.19.1": "0.19.1", None: "0.18.1"}

# Fields that PEFT 0.17 dumps with every LoraConfig; it was the last that did not add its own version.
_PEFT_0_17_FIELDS = {"target_parameters", "trainable_token_indices", "use_qalora", "corda_config", "auto_mapping"}


@dataclass(frozen=True)
class Writer:
    """Who wrote the file.

    Attributes:
        conclusion: Its name, as far as it is known, and the evidence.
        peft: The PEFT release whose layout rule the file follows; None where nobody says.
        transformers: The transformers release beside it; None where nobody says.
        packing: `"rank_major"` or `"grouped"` where the writer says or implies it.
        packing_evidence: Why.
        marked: Whether the packing comes from a marker made for this purpose.
    """

    conclusion: Conclusion
    peft: str | None = None
    transformers: str | None = None
    packing: str | None = None
    packing_evidence: str = ""
    marked: bool = False


def find_writer(source: AdapterSource, stamp: Stamp | None, written_by: str | None) -> Writer:
    """The writer of an adapter. What the caller says (`written_by`) wins over everything but the library's own stamp.

    Raises:
        AdapterFileError: A marker or version in the file makes no sense.
        UnsupportedPeftError: `written_by` names no release.
    """
    if stamp is not None:
        text = f"stamped by peft_moe_compat, PEFT {stamp.peft}, transformers {stamp.transformers}"
        conclusion = Conclusion(f"PEFT {stamp.peft}", "certain", (text,))
        return Writer(conclusion, stamp.peft, stamp.transformers, stamp.packing, text, marked=True)
    packing, packing_evidence, marked = _unsloth_packing(source.config)
    if written_by is not None:
        peft, transformers = parse_releases(written_by)
        beside = f", transformers {transformers}" if transformers else ""
        conclusion = Conclusion(f"PEFT {peft}{beside}", "stated", (SAID_BY_CALLER,))
        implied = packing or "rank_major"
        return Writer(conclusion, peft, transformers, implied, packing_evidence or _peft_packs(peft), marked)
    if AUTOMODEL_FILE in source.side_files:
        return _automodel(source.side_files[AUTOMODEL_FILE])
    version = source.config.get("peft_version")
    if version is not None:
        peft, evidence = _checked_version(version), f"peft_version is {version!r} in adapter_config.json"
    elif _PEFT_0_17_FIELDS <= source.config.keys():
        peft, evidence = "0.17.0", "adapter_config.json has the fields of PEFT 0.17, and no peft_version, as then"
    else:
        reason = "adapter_config.json has neither a peft_version nor the fields that PEFT 0.17 writes"
        conclusion = Conclusion(None, "none", (reason,), "--written-by peft==VERSION")
        return Writer(conclusion, packing=packing, packing_evidence=packing_evidence, marked=marked)
    name = f"PEFT {'0.17' if version is None else peft}"
    if packing is not None:
        conclusion = Conclusion(f"Unsloth, {name}", "stated", (evidence, packing_evidence))
        return Writer(conclusion, peft, None, packing, packing_evidence, marked)
    confidence = "stated" if version is not None else "likely"
    return Writer(Conclusion(name, confidence, (evidence,)), peft, None, "rank_major", _peft_packs(peft))


def _peft_packs(peft: str) -> str:
    return f"PEFT {peft} packs lora_B's columns as '(r E)', as every release does"


def _checked_version(version: Any) -> str:
    try:
        release_for(str(version))
    except UnsupportedPeftError as error:
        raise AdapterFileError(f"adapter_config.json has peft_version {show(version)}: {error}") from None
    return str(version)


def _unsloth_packing(config: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """(packing, evidence, whether a marker says so) as Unsloth leaves it; (None, "", False) where it left nothing.

    Raises:
        AdapterFileError: Its markers contradict each other or are unknown words.
    """
    auto_mapping = config.get("auto_mapping")
    places = {"adapter_config.json": config, "its auto_mapping": auto_mapping if isinstance(auto_mapping, dict) else {}}
    said: dict[str, str] = {}
    for place, content in places.items():
        values = [content[UNSLOTH_LAYOUT]] if UNSLOTH_LAYOUT in content else []
        detail = content.get(UNSLOTH_DETAIL)
        if isinstance(detail, dict) and isinstance(detail.get("parameters"), dict):
            entries = detail["parameters"].values()
            values += [entry.get(UNSLOTH_LAYOUT) for entry in entries if isinstance(entry, dict)]
        for value in values:
            if value not in _UNSLOTH_PACKINGS and value not in PACKINGS:
                raise AdapterFileError(
                    f"{UNSLOTH_LAYOUT} is {show(value)} in {place}; one of {', '.join(_UNSLOTH_PACKINGS)} was "
                    "expected. An adapter whose parameters are packed differently has to be saved again by Unsloth."
                )
            said[_UNSLOTH_PACKINGS.get(value, value)] = f"{UNSLOTH_LAYOUT} is {value!r} in {place}"
    if len(said) > 1:
        raise AdapterFileError(f"Unsloth's markers contradict each other: {'; '.join(said.values())}.")
    if said:
        ((packing, evidence),) = said.items()
        return packing, evidence, True
    if places["its auto_mapping"].get(_UNSLOTH_FINGERPRINT) and config.get("target_parameters"):
        text = f"auto_mapping has {_UNSLOTH_FINGERPRINT!r} and no marker: Unsloth before 2026-09, grouping by expert"
        return "grouped", text, False
    return None, "", False


def _automodel(content: Mapping[str, Any]) -> Writer:
    layout = content.get(_AUTOMODEL_KEY)
    if layout not in _AUTOMODEL_LAYOUTS:
        known = ", ".join(str(name) for name in _AUTOMODEL_LAYOUTS if name)
        raise AdapterFileError(
            f"{AUTOMODEL_FILE} has {_AUTOMODEL_KEY} {show(layout)}; one of {known} was expected. Is the file damaged, "
            "or its writer newer than this package?"
        )
    name, text = (
        ("NeMo Automodel 0.4 to 0.6", f"{AUTOMODEL_FILE} without {_AUTOMODEL_KEY}")
        if layout is None
        else ("NeMo Automodel >= 0.7", f"{_AUTOMODEL_KEY} is {layout!r} in {AUTOMODEL_FILE}")
    )
    peft = _AUTOMODEL_LAYOUTS[layout]
    conclusion = Conclusion(name, "stated", (text,))
    return Writer(conclusion, peft, None, "rank_major", f"{name} packs as PEFT {peft} does")
