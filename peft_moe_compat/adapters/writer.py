"""Who wrote an adapter, and what follows from that about its layout: from stamps, markers and the config it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import AdapterFileError, UnsupportedPeftError
from ..releases import AUTOMODEL_LAYOUTS, RULES, release_for
from .adapter_config import AUTOMODEL_NAME, UNSLOTH_LAYOUT, AdapterConfig, AutomodelMarks, UnslothMarks
from .base_model import BaseModel
from .conclusions import Conclusion, Reason, Settle
from .files import show
from .source import AdapterSource
from .stated import Stated

__all__ = ["Writer", "find_writer"]

# Unsloth's words for the packings. Source: unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py.
_UNSLOTH_PACKINGS = {"grouped_by_expert": "grouped", "rank_major": "rank_major"}

# Families whose experts Unsloth ran with a forward of its own before it left markers: grouped by expert. All others ran
# PEFT's. Source: the same file.
_UNSLOTH_GROUPED = {
    "deepseek_v3",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "gemma4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "lfm2_moe",
    "mixtral",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
}

_UNSAID = Reason("packing_unsaid")


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
    packing_evidence: Reason = _UNSAID
    marked: bool = False
    by_caller: bool = False


def find_writer(source: AdapterSource, stated: Stated) -> Writer:
    """The writer of an adapter. What the caller says wins over everything but the library's own stamp.

    Raises:
        AdapterFileError: A marker or version in the file makes no sense.
    """
    stamp = source.stamp
    if stamp is not None:
        beside = stamp.transformers or "of any release"
        reason = Reason("stamped", {"peft": stamp.peft, "transformers": beside})
        conclusion = Conclusion(f"PEFT {stamp.peft}", "certain", (reason,))
        return Writer(conclusion, stamp.peft, stamp.transformers, {None: stamp.packing}, reason, marked=True)
    by_caller = stated.written_by is not None
    if not by_caller and source.automodel is not None:
        return _automodel(source.automodel)
    unsloth = _unsloth(source.config.unsloth, source.base)
    peft, transformers, conclusion = _release(source.config, stated)
    if unsloth is not None:
        name = f"Unsloth, {conclusion.value}" if conclusion.value else "Unsloth"
        named = Conclusion(name, "stated", (*conclusion.evidence, unsloth.evidence))
        return Writer(named, peft, transformers, unsloth.packings, unsloth.evidence, unsloth.marked, by_caller)
    if peft is None:
        return Writer(conclusion)
    packs = Reason("peft_packs", {"peft": peft})
    return Writer(conclusion, peft, transformers, {None: "rank_major"}, packs, by_caller=by_caller)


def _release(config: AdapterConfig, stated: Stated) -> tuple[str | None, str | None, Conclusion]:
    """(PEFT, transformers, conclusion), from what the caller says or the config."""
    peft, transformers = stated.releases
    if peft is not None:
        beside = f", transformers {transformers}" if transformers else ""
        return peft, transformers, Conclusion(f"PEFT {peft}{beside}", "stated", (Reason("said"),))
    version = config.peft_version
    if version is not None:
        try:
            release_for(version)
        except UnsupportedPeftError as error:
            raise AdapterFileError(f"adapter_config.json has peft_version {show(version)}: {error}") from None
        reason = Reason("peft_version", {"version": version})
        return version, None, Conclusion(f"PEFT {version}", "stated", (reason,))
    if config.has_peft_0_17_fields:
        return str(RULES[0].since), None, Conclusion("PEFT 0.17", "likely", (Reason("peft_0_17_fields"),))
    settle = (Settle("written_by", "peft==VERSION"),)
    return None, None, Conclusion(None, "none", (Reason("no_version"),), settle)


@dataclass(frozen=True)
class _Unsloth:
    """What Unsloth left in a config."""

    packings: Mapping[str | None, str]
    evidence: Reason
    marked: bool


def _unsloth(marks: UnslothMarks, model: BaseModel | None) -> _Unsloth | None:
    """What Unsloth left in the config, None where it left nothing.

    Raises:
        AdapterFileError: Its markers contradict each other or are unknown words.
    """
    found: dict[str | None, str] = {}
    for parameter, value in marks.layouts:
        if not isinstance(value, str) or value not in _UNSLOTH_PACKINGS:
            raise AdapterFileError(
                f"Unsloth's {UNSLOTH_LAYOUT} is {show(value)}; one of {', '.join(_UNSLOTH_PACKINGS)} was expected. "
                "Was the file written by a newer Unsloth?"
            )
        if found.setdefault(parameter, _UNSLOTH_PACKINGS[value]) != _UNSLOTH_PACKINGS[value]:
            raise AdapterFileError(f"Unsloth's markers contradict each other: {UNSLOTH_LAYOUT} is {marks.layouts}.")
    if found:
        said = ", ".join(f"{value} for {parameter or 'all'}" for parameter, value in found.items())
        return _Unsloth(found, Reason("unsloth_layout", {"said": said}), marked=True)
    if not marks.fixed:
        return None
    before = Reason("unsloth")
    family = model.model_type if model is not None else marks.family
    if family is None:
        return _Unsloth({}, Reason("unsloth_unknown", {"unsloth": before}), marked=False)
    if family in _UNSLOTH_GROUPED:
        reason = Reason("unsloth_groups", {"unsloth": before, "family": family})
        return _Unsloth({None: "grouped"}, reason, marked=False)
    reason = Reason("unsloth_left", {"unsloth": before, "family": family})
    return _Unsloth({None: "rank_major"}, reason, marked=False)


def _automodel(marks: AutomodelMarks) -> Writer:
    layout = marks.layout
    if not isinstance(layout, str | None) or layout not in AUTOMODEL_LAYOUTS:
        known = ", ".join(str(name) for name in AUTOMODEL_LAYOUTS if name)
        raise AdapterFileError(
            f"{AUTOMODEL_NAME} has paramwrapper_layout {show(layout)}; one of {known} was expected. Is the file "
            "damaged, or its writer newer than this package?"
        )
    if layout is None:
        name, reason = "NeMo Automodel 0.4 to 0.6", Reason("automodel_no_layout")
    else:
        name, reason = "NeMo Automodel >= 0.7", Reason("automodel_layout", {"layout": layout})
    peft = AUTOMODEL_LAYOUTS[layout]
    packs = Reason("automodel_packs", {"name": name, "peft": peft})
    return Writer(Conclusion(name, "stated", (reason,)), peft, None, {None: "rank_major"}, packs)
