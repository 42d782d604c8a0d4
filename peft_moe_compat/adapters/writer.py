"""Who wrote an adapter, and what follows from that about its layout: from stamps, markers and the config it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import AdapterFileError, UnsupportedPeftError
from ..families import family
from ..releases import AUTOMODEL_LAYOUTS, NEWEST_TESTED, NEWEST_TRANSFORMERS, RULES, newer_than_tested, release_for
from .adapter_config import AUTOMODEL_NAME, UNSLOTH_LAYOUT, AdapterConfig
from .base_model import BaseModel
from .conclusions import Conclusion, Evidence, Settle
from .files import show
from .source import AdapterSource
from .stated import Stated

__all__ = ["Writer", "find_writer"]

# Unsloth's words for the packings. Source: unsloth_zoo 2026.10.9, temporary_patches/moe_utils.py.
_UNSLOTH_PACKINGS = {"grouped_by_expert": "grouped", "rank_major": "rank_major"}

_UNSAID = Evidence("packing_unsaid")


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
        orientation: What it writes for every model, as no PEFT release does; None where there is no such thing.
        by_caller: Whether the caller named the release.
    """

    conclusion: Conclusion
    peft: str | None = None
    transformers: str | None = None
    packings: Mapping[str | None, str] = field(default_factory=dict)
    packing_evidence: Evidence = _UNSAID
    marked: bool = False
    orientation: str | None = None
    by_caller: bool = False


def find_writer(source: AdapterSource, stated: Stated) -> Writer:
    """The writer of an adapter. What the caller says wins over everything but the library's own stamp.

    Raises:
        AdapterFileError: A marker or version in the file makes no sense.
    """
    stamp = source.stamp
    if stamp is not None:
        beside = stamp.transformers or "of any release"
        reason = Evidence("stamped", {"peft": stamp.peft, "transformers": beside})
        doubt = _doubt(stamp.peft, stamp.transformers)
        conclusion = Conclusion(f"PEFT {stamp.peft}", "stated" if doubt else "certain", (reason, *doubt))
        return Writer(conclusion, stamp.peft, stamp.transformers, {None: stamp.packing}, reason, marked=True)
    if stated.written_by is None and source.automodel is not None:
        return _automodel(source.automodel)
    if stated.written_by is None and source.form == "fused" and source.config.for_vllm:
        return _for_vllm(source.config)
    unsloth = _unsloth(source.config, source.base)
    writer = _release(source.config, stated)
    if unsloth is not None:
        packings, evidence, marked = unsloth
        name = f"Unsloth, {writer.conclusion.value}" if writer.conclusion.value else "Unsloth"
        named = Conclusion(name, "stated", (*writer.conclusion.evidence, evidence))
        return replace(writer, conclusion=named, packings=packings, packing_evidence=evidence, marked=marked)
    if writer.peft is None:
        return writer
    packs = Evidence("peft_packs", {"peft": writer.peft})
    return replace(writer, packings={None: "rank_major"}, packing_evidence=packs)


def _doubt(peft: str, transformers: str | None) -> tuple[Evidence, ...]:
    """That nobody knows how these releases lay things out; nothing where it is known."""
    known = {"peft": NEWEST_TESTED, "transformers": NEWEST_TRANSFORMERS}
    return (Evidence("newer_release", known),) if newer_than_tested(peft, transformers) else ()


def _for_vllm(config: AdapterConfig) -> Writer:
    """SkyRL and prime-rl write such a config; one of PEFT's own was rewritten, by ART, say, which exchanges factors.

    vLLM reads linear pairs of every family. Source: vllm 0.33, lora/model_manager.py, _stack_moe_lora_weights.
    """
    if config.pefts_own:
        return Writer(Conclusion(None, "none", (Evidence("rewritten"),), (Settle("written_by", "peft==VERSION"),)))
    reason = Evidence("for_vllm")
    writer = Conclusion("SkyRL or prime-rl", "likely", (reason,))
    return Writer(writer, None, None, {None: "rank_major"}, reason, orientation="linear")


def _release(config: AdapterConfig, stated: Stated) -> Writer:
    """The release alone, from what the caller says or the config."""
    peft, transformers = stated.releases
    if peft is not None:
        beside = f", transformers {transformers}" if transformers else ""
        conclusion = Conclusion(f"PEFT {peft}{beside}", "stated", (Evidence("said"), *_doubt(peft, transformers)))
        return Writer(conclusion, peft, transformers, by_caller=True)
    version = config.peft_version
    if version is not None:
        try:
            release_for(version)
        except UnsupportedPeftError as error:
            raise AdapterFileError(f"adapter_config.json has peft_version {show(version)}: {error}") from None
        reason = Evidence("peft_version", {"version": version})
        return Writer(Conclusion(f"PEFT {version}", "stated", (reason, *_doubt(version, None))), version)
    if config.has_peft_0_17_fields and not config.newer_fields:
        return Writer(Conclusion("PEFT 0.17", "likely", (Evidence("peft_0_17_fields"),)), str(RULES[0].since))
    newer = Evidence("newer_fields", {"names": ", ".join(config.newer_fields)})
    reason = newer if config.newer_fields else Evidence("no_version")
    return Writer(Conclusion(None, "none", (reason,), (Settle("written_by", "peft==VERSION"),)))


def _unsloth(config: AdapterConfig, model: BaseModel | None) -> tuple[Mapping[str | None, str], Evidence, bool] | None:
    """(packings, evidence, whether marked) as `Writer` has them, from what Unsloth left; None where it left nothing.

    Raises:
        AdapterFileError: Its markers contradict each other or are unknown words.
    """
    found: dict[str | None, str] = {}
    for parameter, value in config.unsloth_layouts:
        if not isinstance(value, str) or value not in _UNSLOTH_PACKINGS:
            raise AdapterFileError(
                f"Unsloth's {UNSLOTH_LAYOUT} is {show(value)}; one of {', '.join(_UNSLOTH_PACKINGS)} was expected. "
                "Was the file written by a newer Unsloth?"
            )
        if found.setdefault(parameter, _UNSLOTH_PACKINGS[value]) != _UNSLOTH_PACKINGS[value]:
            said = config.unsloth_layouts
            raise AdapterFileError(f"Unsloth's markers contradict each other: {UNSLOTH_LAYOUT} is {said}.")
    if found:
        words = ", ".join(f"{value} for {parameter or 'all'}" for parameter, value in found.items())
        return found, Evidence("unsloth_layout", {"said": words}), True
    if not config.unsloth_fixed:
        return None
    before = Evidence("unsloth")
    model_type = model.model_type if model is not None else config.unsloth_family
    if model_type is None:
        return {}, Evidence("unsloth_unknown", {"unsloth": before}), False
    if family(model_type).unsloth_grouped:
        return {None: "grouped"}, Evidence("unsloth_groups", {"unsloth": before, "family": model_type}), False
    return {None: "rank_major"}, Evidence("unsloth_left", {"unsloth": before, "family": model_type}), False


def _automodel(content: Mapping[str, Any]) -> Writer:
    layout = content.get("paramwrapper_layout")
    if not isinstance(layout, str | None) or layout not in AUTOMODEL_LAYOUTS:
        known = ", ".join(str(name) for name in AUTOMODEL_LAYOUTS if name)
        raise AdapterFileError(
            f"{AUTOMODEL_NAME} has paramwrapper_layout {show(layout)}; one of {known} was expected. Is the file "
            "damaged, or its writer newer than this package?"
        )
    if layout is None:
        name, reason = "NeMo Automodel 0.4 to 0.6", Evidence("automodel_no_layout")
    else:
        name, reason = "NeMo Automodel >= 0.7", Evidence("automodel_layout", {"layout": layout})
    peft = AUTOMODEL_LAYOUTS[layout]
    packs = Evidence("automodel_packs", {"name": name, "peft": peft})
    return Writer(Conclusion(name, "stated", (reason,)), peft, None, {None: "rank_major"}, packs)
